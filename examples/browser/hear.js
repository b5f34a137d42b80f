// The model, in a worker, so that the page stays awake while it thinks. It takes samples and gives words with times.
// It knows an exported folder and ONNX Runtime; it refuses to know files, formats and the page.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

const MODEL = new URL("./model/", import.meta.url);
const WINDOW_S = 20; // attention needs memory by the square of the length, so what is longer is heard in parts
const SEEK_S = 5; // each cut where it is quietest in so many last seconds

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

let model; // a promise: the model is fetched when it is first needed, and kept

self.onmessage = async ({ data: { samples } }) => {
  try {
    const { note, frameS, least, session } = await (model ??= load().catch(again));
    const rate = note.preprocessing.rate_hz;
    if (samples.length < least) throw new Error(`shorter than ${least} samples, nothing can be heard.`);
    const began = performance.now();
    let busyMs = 0;
    for (const [start, end] of windows(samples, rate)) {
      const logits = await hear(session, note, samples.subarray(start, end));
      busyMs = performance.now() - began;
      const words = read(logits, note.vocabulary, start / rate, frameS);
      postMessage({ what: "words", words, share: end / samples.length });
    }
    postMessage({ what: "done", busyS: busyMs / 1000, threads: ort.env.wasm.numThreads });
  } catch (error) {
    postMessage({ what: "failed", why: error.message ?? String(error) });
  }
};

function again(error) {
  model = undefined;
  throw error;
}

async function load() {
  const [note, config] = await Promise.all(["mowa.json", "config.json"].map(async (name) => (await get(name)).json()));
  const { graph } = note.details;
  const weights = Object.keys(note.files).filter((name) => name.endsWith(".data"));
  const parts = await fetched([graph, ...weights]);
  const session = await ort.InferenceSession.create(parts[0], {
    executionProviders: ["wasm"],
    externalData: weights.map((path, index) => ({ path, data: parts[index + 1] })),
  });
  const bytes = parts.reduce((sum, part) => sum + part.length, 0);
  postMessage({ what: "ready", name: note.origin.name, scheme: note.scheme.name, bytes });
  const stride = config.conv_stride.reduce((product, one) => product * one, 1);
  const least = config.conv_kernel.reduceRight((heard, one, index) => (heard - 1) * config.conv_stride[index] + one, 1);
  return { note, session, least, frameS: stride / note.preprocessing.rate_hz };
}

async function get(name) {
  const answer = await fetch(new URL(name, MODEL));
  if (!answer.ok) throw new Error(`${name} is not there (${answer.status}): is FOLDER an ONNX export?`);
  return answer;
}

// The files as bytes, told of as they come.
async function fetched(names) {
  const answers = await Promise.all(names.map(get));
  const total = answers.reduce((sum, answer) => sum + Number(answer.headers.get("Content-Length")), 0);
  let there = 0;
  const share = (more) => (total ? Math.min(1, (there += more) / total) : 0);
  return Promise.all(
    answers.map(async (answer) => {
      const pieces = [];
      for (let reader = answer.body.getReader(), piece; !(piece = await reader.read()).done; ) {
        pieces.push(piece.value);
        postMessage({ what: "loading", share: share(piece.value.length) });
      }
      return new Uint8Array(await new Blob(pieces).arrayBuffer());
    }),
  );
}

// Where to cut: [start, end] in samples, end to end.
function* windows(samples, rate) {
  const step = rate / 50;
  let start = 0;
  while (samples.length - start > WINDOW_S * rate) {
    const last = Math.min(start + WINDOW_S * rate, samples.length - rate); // what is left is a second at least
    let [quietest, cut] = [Infinity, 0];
    for (let at = start + (WINDOW_S - SEEK_S) * rate; at < last; at += step) {
      const loud = samples.subarray(at - 5 * step, at + 5 * step).reduce((sum, value) => sum + value * value, 0);
      if (loud < quietest) [quietest, cut] = [loud, at];
    }
    yield [start, cut];
    start = cut;
  }
  yield [start, samples.length];
}

async function hear(session, note, sound) {
  const shape = [1, sound.length];
  const values = note.preprocessing.normalize ? normalised(sound) : sound;
  const feed = { input_values: new ort.Tensor("float32", values, shape) };
  if (note.details.masked) {
    feed.attention_mask = new ort.Tensor("int64", new BigInt64Array(sound.length).fill(1n), shape);
  }
  return (await session.run(feed)).logits;
}

// Zero mean, unit variance: (x - mean) / sqrt(var + 1e-7).
function normalised(sound) {
  const mean = sound.reduce((sum, value) => sum + value, 0) / sound.length;
  const variance = sound.reduce((sum, value) => sum + (value - mean) ** 2, 0) / sound.length;
  const scale = 1 / Math.sqrt(variance + 1e-7);
  return sound.map((value) => (value - mean) * scale);
}

// The likeliest token of every frame, special ones left out; repeats are one, blanks are none, delimiters part words.
function read({ data, dims: [, frames, width] }, { tokens, blank, delimiter, specials }, startS, frameS) {
  const textual = [...tokens.keys()].filter((token) => !specials.includes(token));
  const words = [];
  let [before, open] = [blank, false];
  for (let frame = 0; frame < frames; frame++) {
    const row = data.subarray(frame * width, (frame + 1) * width);
    const best = textual.reduce((a, b) => (row[b] > row[a] ? b : a));
    const [begins, ends] = [startS + frame * frameS, startS + (frame + 1) * frameS];
    if (best === delimiter || tokens[best] === " ") open = false;
    else if (best !== blank && best !== before) {
      if (!open) words.push({ text: "", startS: begins });
      words.at(-1).text += tokens[best];
      open = true;
    }
    if (open && best !== blank) words.at(-1).endS = ends;
    before = best;
  }
  return words;
}

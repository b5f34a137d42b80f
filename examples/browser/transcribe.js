// Worker that loads an exported model into ONNX Runtime and transcribes samples: it receives { samples } and posts
// messages of type loading, ready, words, done or failed.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

const MODEL = new URL("./model/", import.meta.url);
const WINDOW_S = 20; // longer recordings are split: the memory of attention grows with the square of the length
const SEEK_S = 5; // each window is cut at the quietest point of its last seconds

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

let loading; // promise of the model, which is fetched once, on first use

self.onmessage = async ({ data: { samples } }) => {
  try {
    const { manifest, frameS, receptiveField, session } = await (loading ??= load().catch(retry));
    const rate = manifest.preprocessing.rate_hz;
    if (samples.length < receptiveField) throw new Error(`the recording has fewer than ${receptiveField} samples.`);
    const started = performance.now();
    let computeMs = 0;
    for (const [start, end] of windows(samples, rate)) {
      const logits = await run(session, manifest, samples.subarray(start, end));
      computeMs = performance.now() - started;
      const words = decode(logits, manifest.vocabulary, start / rate, frameS);
      postMessage({ type: "words", words, fraction: end / samples.length });
    }
    postMessage({ type: "done", computeS: computeMs / 1000, threads: ort.env.wasm.numThreads });
  } catch (error) {
    postMessage({ type: "failed", reason: error.message ?? String(error) });
  }
};

function retry(error) {
  loading = undefined;
  throw error;
}

async function load() {
  const files = ["mowa.json", "config.json"].map(async (name) => (await get(name)).json());
  const [manifest, config] = await Promise.all(files);
  const { graph } = manifest.details;
  const weights = Object.keys(manifest.files).filter((name) => name.endsWith(".data"));
  const parts = await fetchBytes([graph, ...weights]);
  const session = await ort.InferenceSession.create(parts[0], {
    executionProviders: ["wasm"],
    externalData: weights.map((path, index) => ({ path, data: parts[index + 1] })),
  });
  const bytes = parts.reduce((sum, part) => sum + part.length, 0);
  postMessage({ type: "ready", name: manifest.origin.name, scheme: manifest.scheme.name, bytes });
  const { conv_kernel: kernels, conv_stride: strides } = config;
  const hop = strides.reduce((product, stride) => product * stride, 1);
  const receptiveField = kernels.reduceRight((size, kernel, index) => (size - 1) * strides[index] + kernel, 1);
  return { manifest, session, receptiveField, frameS: hop / manifest.preprocessing.rate_hz };
}

async function get(name) {
  const response = await fetch(new URL(name, MODEL));
  if (!response.ok) throw new Error(`${name} is missing (HTTP ${response.status}): is FOLDER an ONNX export?`);
  return response;
}

// Fetch files as bytes, and report the progress.
async function fetchBytes(names) {
  const responses = await Promise.all(names.map(get));
  const total = responses.reduce((sum, response) => sum + Number(response.headers.get("Content-Length")), 0);
  let received = 0;
  const progress = (bytes) => (total ? Math.min(1, (received += bytes) / total) : 0);
  return Promise.all(
    responses.map(async (response) => {
      const pieces = [];
      for (let reader = response.body.getReader(), piece; !(piece = await reader.read()).done; ) {
        pieces.push(piece.value);
        postMessage({ type: "loading", fraction: progress(piece.value.length) });
      }
      return new Uint8Array(await new Blob(pieces).arrayBuffer());
    }),
  );
}

// Yield consecutive windows as [start, end] in samples.
function* windows(samples, rate) {
  const step = rate / 50;
  let start = 0;
  while (samples.length - start > WINDOW_S * rate) {
    const last = Math.min(start + WINDOW_S * rate, samples.length - rate); // leave at least a second
    let [lowest, cut] = [Infinity, 0];
    for (let at = start + (WINDOW_S - SEEK_S) * rate; at < last; at += step) {
      const energy = samples.subarray(at - 5 * step, at + 5 * step).reduce((sum, value) => sum + value * value, 0);
      if (energy < lowest) [lowest, cut] = [energy, at];
    }
    yield [start, cut];
    start = cut;
  }
  yield [start, samples.length];
}

async function run(session, manifest, samples) {
  const shape = [1, samples.length];
  const values = manifest.preprocessing.normalize ? normalize(samples) : samples;
  const inputs = { input_values: new ort.Tensor("float32", values, shape) };
  if (manifest.details.attention_mask) {
    inputs.attention_mask = new ort.Tensor("int64", new BigInt64Array(samples.length).fill(1n), shape);
  }
  return (await session.run(inputs)).logits;
}

// Zero mean, unit variance: (x - mean) / sqrt(var + 1e-7).
function normalize(samples) {
  const mean = samples.reduce((sum, value) => sum + value, 0) / samples.length;
  const variance = samples.reduce((sum, value) => sum + (value - mean) ** 2, 0) / samples.length;
  const scale = 1 / Math.sqrt(variance + 1e-7);
  return samples.map((value) => (value - mean) * scale);
}

// Greedy CTC decoding: take the top token of every frame except special ones, merge repeats, remove blanks.
function decode({ data, dims: [, frames, width] }, { texts, blank, specials }, startS, frameS) {
  const candidates = [...texts.keys()].filter((token) => !specials.includes(token));
  const words = [];
  let [previous, inWord] = [blank, false];
  for (let frame = 0; frame < frames; frame++) {
    const row = data.subarray(frame * width, (frame + 1) * width);
    const best = candidates.reduce((a, b) => (row[b] > row[a] ? b : a));
    const [frameStartS, frameEndS] = [startS + frame * frameS, startS + (frame + 1) * frameS];
    const pieces = best === blank || best === previous ? [] : texts[best].split(/\s+/); // a space in a token ends a word
    for (const [index, piece] of pieces.entries()) {
      if (index > 0) inWord = false;
      if (piece === "") continue;
      if (!inWord) words.push({ text: "", startS: frameStartS });
      words.at(-1).text += piece;
      words.at(-1).endS = frameEndS;
      inWord = true;
    }
    if (inWord && best !== blank) words.at(-1).endS = frameEndS;
    previous = best;
  }
  return words;
}

// The page: reads a recording, and shows its waveform and the words that the worker (transcribe.js) returns.

const RATE = 16000; // sample rate of all models
const BAR = 4; // width of a bar of the waveform with its gap, in pixels

const at = (id) => document.getElementById(id);
const worker = new Worker("transcribe.js", { type: "module" });
const state = { name: "", samples: new Float32Array(), peaks: [], words: [], model: null };

at("file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  await transcribe(file.name, file);
  target.value = ""; // so that the same file can be chosen again
};
at("sample").onclick = async () => transcribe("The sample", await (await fetch("sample.flac")).blob());
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file && !at("file").disabled) transcribe(file.name, file);
});

async function transcribe(name, blob) {
  setBusy(true);
  setStatus("Decoding…");
  try {
    // A context at the model's rate: the browser decodes any format that it plays, and resamples.
    const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
    Object.assign(state, { name, samples: mixDown(decoded), peaks: [], words: [] });
  } catch {
    setBusy(false);
    setStatus(`${name} cannot be decoded: it is damaged, or in a format that this browser does not support.`);
    return;
  }
  URL.revokeObjectURL(at("player").src);
  at("player").src = URL.createObjectURL(blob);
  at("text").replaceChildren();
  at("facts").replaceChildren();
  at("result").hidden = false;
  draw();
  setStatus(state.model ? "Transcribing…" : "Loading the model…");
  worker.postMessage({ samples: state.samples });
}

// Average the channels, as mowa does.
function mixDown(buffer) {
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, index) => buffer.getChannelData(index));
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, index) => channels.reduce((sum, one) => sum + one[index], 0) / channels.length);
}

worker.onmessage = ({ data }) => {
  if (data.type === "loading") at("progress").value = data.fraction;
  else if (data.type === "ready") {
    state.model = data;
    at("progress").removeAttribute("value");
    setStatus("Transcribing…");
  } else if (data.type === "words") {
    if (data.fraction < 1) at("progress").value = data.fraction;
    show(data.words);
  } else if (data.type === "done") finish(data);
  else fail(data.reason);
};
worker.onerror = ({ message }) => fail(message ?? "the worker did not start; see the console");

function show(words) {
  for (const word of words) {
    const span = document.createElement("span");
    span.textContent = word.text;
    span.onclick = () => {
      at("player").currentTime = word.startS;
      at("player").play();
    };
    state.words.push({ ...word, span });
    at("text").append(span, " ");
  }
}

function finish({ computeS, threads }) {
  const lengthS = state.samples.length / RATE;
  const facts = {
    Recording: `${lengthS.toFixed(1)} s`,
    "Compute time": `${computeS.toFixed(2)} s`,
    "Real-time factor": (computeS / lengthS).toFixed(3),
    Threads: threads,
    Model: `${state.model.name}, ${(state.model.bytes / 1e6).toFixed(0)} MB`,
    Scheme: state.model.scheme,
  };
  for (const [name, value] of Object.entries(facts)) {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }));
    row.append(Object.assign(document.createElement("dd"), { textContent: value }));
    at("facts").append(row);
  }
  setBusy(false);
  const summary = `${state.name}: ${state.words.length} words, ${(lengthS / computeS).toFixed(1)} × real time.`;
  setStatus(state.words.length ? summary : `${state.name}: no words found.`);
}

function fail(reason) {
  setBusy(false);
  setStatus(`Transcription failed: ${reason}`);
}

function setBusy(busy) {
  at("file").disabled = at("sample").disabled = busy;
  at("progress").hidden = !busy;
  at("progress").removeAttribute("value");
}

function setStatus(text) {
  at("status").textContent = text;
}

// --- the waveform, colored up to the current position, and the current word ----------------------------------------

function draw() {
  const canvas = at("wave");
  const { width, height } = canvas.getBoundingClientRect();
  const bars = Math.floor(width / BAR);
  if (!bars) return;
  if (state.peaks.length !== bars) state.peaks = computePeaks(state.samples, bars);
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  const [played, rest] = ["--accent", "--faint"].map((name) => getComputedStyle(canvas).getPropertyValue(name));
  const current = (at("player").currentTime * RATE * bars) / state.samples.length;
  state.peaks.forEach((peak, bar) => {
    const barHeight = Math.max(2, peak * height);
    context.fillStyle = bar < current ? played : rest;
    context.beginPath();
    context.roundRect(bar * BAR, (height - barHeight) / 2, BAR * 0.625, barHeight, 1);
    context.fill();
  });
}

function computePeaks(samples, bars) {
  const peaks = Array.from({ length: bars }, (_, bar) =>
    samples
      .subarray((bar * samples.length) / bars, ((bar + 1) * samples.length) / bars)
      .reduce((max, value) => Math.max(max, Math.abs(value)), 0),
  );
  const max = Math.max(1e-6, ...peaks);
  return peaks.map((peak) => peak / max);
}

function follow() {
  const now = at("player").currentTime;
  for (const { span, startS, endS } of state.words) span.classList.toggle("now", startS <= now && now < endS);
  draw();
  if (!at("player").paused) requestAnimationFrame(follow);
}

at("player").onplay = at("player").onseeked = follow;
at("wave").onclick = ({ offsetX }) => {
  at("player").currentTime = (offsetX / at("wave").clientWidth) * at("player").duration;
};
addEventListener("resize", draw);

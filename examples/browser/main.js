// The page: a recording in, its words and waveform out. What hears is a worker (hear.js); here are files and sights.

const RATE = 16000; // what every model of these families hears
const BAR = 4; // pixels of a bar of the waveform, a gap included

const at = (id) => document.getElementById(id);
const worker = new Worker("hear.js", { type: "module" });
const state = { name: "", samples: new Float32Array(), peaks: [], words: [], model: null };

at("file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  await take(file.name, file);
  target.value = ""; // else the same file could not be chosen again
};
at("sample").onclick = async () => take("The sample", await (await fetch("sample.flac")).blob());
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file && !at("file").disabled) take(file.name, file);
});

async function take(name, blob) {
  busy(true);
  say("Decoding…");
  try {
    // A context at the model's rate: the browser decodes whatever it can play, and resamples.
    const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
    Object.assign(state, { name, samples: mono(sound), peaks: [], words: [] });
  } catch {
    busy(false);
    say(`${name} cannot be decoded: it is damaged, or of a format that this browser does not know.`);
    return;
  }
  URL.revokeObjectURL(at("player").src);
  at("player").src = URL.createObjectURL(blob);
  at("text").replaceChildren();
  at("facts").replaceChildren();
  at("heard").hidden = false;
  draw();
  say(state.model ? "Listening…" : "Loading the model…");
  worker.postMessage({ samples: state.samples });
}

// Channels averaged, as mowa does.
function mono(sound) {
  const channels = Array.from({ length: sound.numberOfChannels }, (_, index) => sound.getChannelData(index));
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, index) => channels.reduce((sum, one) => sum + one[index], 0) / channels.length);
}

worker.onmessage = ({ data }) => {
  if (data.what === "loading") at("progress").value = data.share;
  else if (data.what === "ready") {
    state.model = data;
    at("progress").removeAttribute("value");
    say("Listening…");
  } else if (data.what === "words") {
    if (data.share < 1) at("progress").value = data.share;
    show(data.words);
  } else if (data.what === "done") finish(data);
  else fail(data.why);
};
worker.onerror = ({ message }) => fail(message ?? "the worker cannot be started; the console says why");

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

function finish({ busyS, threads }) {
  const lengthS = state.samples.length / RATE;
  const facts = {
    Recording: `${lengthS.toFixed(1)} s`,
    "Heard in": `${busyS.toFixed(2)} s`,
    "Real-time factor": (busyS / lengthS).toFixed(3),
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
  busy(false);
  const told = `${state.name}: ${state.words.length} words, ${(lengthS / busyS).toFixed(1)} × as fast as it was spoken.`;
  say(state.words.length ? told : `${state.name}: no words were heard.`);
}

function fail(why) {
  busy(false);
  say(`It did not work: ${why}`);
}

function busy(yes) {
  at("file").disabled = at("sample").disabled = yes;
  at("progress").hidden = !yes;
  at("progress").removeAttribute("value");
}

function say(words) {
  at("status").textContent = words;
}

// --- the waveform, coloured as far as it was played, and the word that is being said --------------------------------

function draw() {
  const canvas = at("wave");
  const { width, height } = canvas.getBoundingClientRect();
  const bars = Math.floor(width / BAR);
  if (!bars) return;
  if (state.peaks.length !== bars) state.peaks = peaks(state.samples, bars);
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  const pen = canvas.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  const [played, rest] = ["--accent", "--faint"].map((name) => getComputedStyle(canvas).getPropertyValue(name));
  const until = (at("player").currentTime * RATE * bars) / state.samples.length;
  state.peaks.forEach((peak, bar) => {
    const tall = Math.max(2, peak * height);
    pen.fillStyle = bar < until ? played : rest;
    pen.beginPath();
    pen.roundRect(bar * BAR, (height - tall) / 2, BAR * 0.625, tall, 1);
    pen.fill();
  });
}

function peaks(samples, bars) {
  const found = Array.from({ length: bars }, (_, bar) =>
    samples
      .subarray((bar * samples.length) / bars, ((bar + 1) * samples.length) / bars)
      .reduce((most, value) => Math.max(most, Math.abs(value)), 0),
  );
  const most = Math.max(1e-6, ...found);
  return found.map((peak) => peak / most);
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

"use strict";
// The state of the page is one number: how many steps have been done (0 = all masks). show(n) draws it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const P = data.prompt.length, G = data.canvas, T = P + G, S = data.commits.length;
const WHOLE_SECONDS = 12; // a replay at speed 1 takes about this long
let done = S;

// --- what was recorded ---------------------------------------------------------------------------------------------

// commitsOf[slot]: the [step, token, confidence] of its commits, in order. Step -1: the request gave the token. No token:
// a decoder took it back. An edit is a commit of another token.
const commitsOf = Array.from({ length: G }, () => []);
for (const [slot, token] of data.given) commitsOf[slot].push([-1, token, null]);
data.commits.forEach((commits, step) => {
  for (const slot of data.revoked[step]) commitsOf[slot].push([step, null, null]);
  for (const [slot, token, confidence] of commits) commitsOf[slot].push([step, token, confidence]);
  for (const [slot, token] of data.edited[step]) commitsOf[slot].push([step, token, null]);
});

function commitBefore(slot, step) {
  const last = commitsOf[slot].findLast((commit) => commit[0] < step);
  return last && last[1] !== null ? last : undefined;
}

function refreshedIn(step) {
  const ranges = step < 0 ? [] : data.refreshed[step] ?? [0, T];
  const set = new Uint8Array(T);
  for (let i = 0; i < ranges.length; i += 2) set.fill(1, ranges[i], ranges[i] + ranges[i + 1]);
  return set;
}

const CONTROL = { "\n": "↵", "\t": "⇥", "\r": "␍" };
function spelled(token) {
  const text = data.texts[token];
  if (text === undefined) return `[${token}]`;
  return text.replace(/[\n\t\r]/g, (c) => CONTROL[c]);
}

// --- tokens --------------------------------------------------------------------------------------------------------

function makeToken(box, position, token) {
  const span = document.createElement("span");
  span.dataset.position = position;
  setToken(span, token);
  box.append(span);
  if ((data.texts[token] ?? "").endsWith("\n")) box.append(document.createElement("br"));
  return span;
}

function setToken(span, token) {
  if (span.token === token) return;
  span.token = token;
  span.textContent = token === undefined ? "····" : spelled(token);
  span.classList.toggle("control", token !== undefined && /^<.*>$/.test(data.texts[token] ?? ""));
}

const promptSpans = data.prompt.map((token, position) => makeToken($("prompt"), position, token));
// Each slot has its last token from the start, invisible while it is a mask: the text does not jump about.
const lastToken = (commits) => commits.findLast((commit) => commit[1] !== null)?.[1];
const canvasSpans = commitsOf.map((commits, slot) => makeToken($("canvas"), P + slot, lastToken(commits)));
if (data.finish === "stop") canvasSpans.slice(data.output.length).forEach((span) => span.classList.add("after"));

function showTokens() {
  const fresh = refreshedIn(done - 1);
  canvasSpans.forEach((span, slot) => {
    const commit = commitBefore(slot, done);
    span.classList.toggle("mask", !commit);
    span.classList.toggle("fresh", commit !== undefined && commit[0] === done - 1 && done > 0);
    span.classList.toggle("given", commit?.[0] === -1);
    span.classList.toggle("refreshed", fresh[P + slot] === 1);
    const unsure = commit && commit[2] !== null ? Math.round(75 * (1 - commit[2])) : 0;
    span.style.backgroundColor = unsure ? `color-mix(in srgb, var(--unsure) ${unsure}%, transparent)` : "";
    if (commit) setToken(span, commit[1]);
  });
  if ($("prompt-box").open) promptSpans.forEach((span, i) => span.classList.toggle("refreshed", fresh[i] === 1));
}

// --- pictures: steps downward --------------------------------------------------------------------------------------

const ratio = Math.min(2, window.devicePixelRatio || 1);
const pictureHeight = Math.min(560, Math.max(96, 12 * S));
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function rgb(name) {
  const hex = color(name).slice(1);
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function prepare(canvas) {
  canvas.style.height = `${pictureHeight}px`;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.round(pictureHeight * ratio);
  return canvas.getContext("2d");
}

// A pixel stands for one or more positions and steps; what of them is masked or refreshed mixes its colour.
function drawMap() {
  const context = prepare($("picture"));
  const width = Math.min(T, $("picture").width), height = Math.min(S, $("picture").height);
  if (!height) return;
  const refreshed = new Float32Array(width * height), masked = new Float32Array(width * height);
  const committed = new Uint8Array(width * height);
  const column = (position) => Math.floor((position * width) / T);
  const holding = new Float32Array(width); // masks of each column before the step
  const isMask = new Uint8Array(G);
  const setMask = (slot, mask) => {
    holding[column(P + slot)] += mask - isMask[slot];
    isMask[slot] = mask;
  };
  for (let slot = 0; slot < G; slot++) setMask(slot, commitBefore(slot, 0) ? 0 : 1);
  for (let step = 0; step < S; step++) {
    const line = Math.floor((step * height) / S) * width;
    const ranges = data.refreshed[step] ?? [0, T];
    for (let i = 0; i < ranges.length; i += 2)
      for (let p = ranges[i]; p < ranges[i] + ranges[i + 1]; p++) refreshed[line + column(p)]++;
    for (let x = 0; x < width; x++) masked[line + x] += holding[x];
    for (const slot of data.revoked[step]) setMask(slot, 1);
    for (const [slot] of data.commits[step]) {
      committed[line + column(P + slot)] = 1;
      setMask(slot, 0);
    }
  }
  const image = new ImageData(width, height), each = (T / width) * (S / height);
  const paint = { back: rgb("--panel"), mask: rgb("--mask"), cell: rgb("--refreshed"), commit: rgb("--commit") };
  for (let i = 0; i < width * height; i++) {
    const a = Math.min(1, masked[i] / each), b = 0.85 * Math.min(1, refreshed[i] / each);
    for (let c = 0; c < 3; c++) {
      const ground = paint.back[c] + a * (paint.mask[c] - paint.back[c]);
      image.data[4 * i + c] = committed[i] ? paint.commit[c] : ground + b * (paint.cell[c] - ground);
    }
    image.data[4 * i + 3] = 255;
  }
  const small = document.createElement("canvas");
  small.width = width;
  small.height = height;
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, $("picture").width, $("picture").height);
  const edge = (P / T) * $("picture").width; // where the canvas begins
  context.fillStyle = color("--text");
  context.fillRect(edge - ratio / 2, 0, ratio, $("picture").height);
}

// The first step is always full, and often far longer than the others: it may reach beyond the scale.
const scaleOf = (values) => Math.max(...(values.length > 1 ? values.slice(1) : values), 1e-9);

function drawBars(id, values) {
  const context = prepare($(id)), most = scaleOf(values);
  const { width, height } = $(id);
  const lines = Math.min(S, height);
  context.fillStyle = color("--refreshed");
  for (let y = 0; y < lines; y++) {
    // Where steps share a pixel line, the longest bar.
    const from = Math.floor((y * S) / lines), to = Math.max(from + 1, Math.floor(((y + 1) * S) / lines));
    const value = values.slice(from, to).reduce((a, b) => Math.max(a, b));
    const top = (y * height) / lines, thickness = height / lines;
    context.fillRect(0, top, Math.min(1, value / most) * width, thickness > 4 ? thickness - ratio : thickness);
  }
}

const pictures = ["picture", "rows", "time"];
let drawn = []; // the pictures without the cursor

function drawPictures() {
  drawMap();
  drawBars("rows", data.rows);
  if (data.seconds) drawBars("time", data.seconds);
  drawn = pictures.map((id) => $(id).getContext("2d").getImageData(0, 0, $(id).width, $(id).height));
  showCursor();
}

function showCursor() {
  pictures.forEach((id, i) => {
    const context = $(id).getContext("2d"), { width, height } = $(id);
    context.putImageData(drawn[i], 0, 0);
    if (!done) return;
    const thickness = Math.max(2 * ratio, height / S), top = ((done - 1) / S) * height;
    context.strokeStyle = color("--text");
    context.lineWidth = ratio;
    context.strokeRect(ratio / 2, Math.min(top, height - thickness) + ratio / 2, width - ratio, thickness - ratio);
  });
}

// --- moving --------------------------------------------------------------------------------------------------------

function show(step) {
  done = Math.max(0, Math.min(S, Math.round(step)));
  $("slider").value = done;
  const now = data.seconds && done ? ` · ${seconds(sum(data.seconds.slice(0, done)))}` : "";
  $("where").textContent = `step ${done} of ${S}${now}`;
  showTokens();
  if (drawn.length) showCursor();
}

let timer = null, last = 0, owed = 0;

function play(on) {
  if (on && done === S) show(0);
  timer = on ? requestAnimationFrame(tick) : timer && cancelAnimationFrame(timer);
  last = performance.now();
  owed = 0;
  $("play").textContent = on ? "Pause" : "Play";
}

function tick(now) {
  owed += Math.max(0, now - last) / 1000; // seconds of replay not shown yet
  last = now;
  let step = done;
  for (let need; step < S && (need = secondsOf(step)) <= owed; step++) owed -= need;
  if (step !== done) show(step);
  if (done === S) play(false);
  else timer = requestAnimationFrame(tick);
}

function secondsOf(step) {
  if ($("speed").value === "recorded") return data.seconds[step];
  return Math.min(0.5, WHOLE_SECONDS / S) / Number($("speed").value);
}

function move(step) {
  play(false);
  show(step);
}

const KEYS = {
  ArrowRight: (many) => move(done + many), ArrowLeft: (many) => move(done - many),
  Home: () => move(0), End: () => move(S), " ": () => play(!timer),
};

document.addEventListener("keydown", (event) => {
  const own = event.target.closest?.("select, summary") || (event.key === " " && event.target.closest?.("button"));
  if (own || event.ctrlKey || event.altKey || event.metaKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key](event.shiftKey ? 10 : 1);
});
$("first").onclick = () => move(0);
$("back").onclick = () => move(done - 1);
$("next").onclick = () => move(done + 1);
$("last").onclick = () => move(S);
$("play").onclick = () => play(!timer);
$("slider").oninput = () => move(Number($("slider").value));
$("prompt-box").ontoggle = showTokens;

// --- pointing ------------------------------------------------------------------------------------------------------

function tip(event, text) {
  $("tip").hidden = !text;
  $("tip").textContent = text;
  $("tip").style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - $("tip").offsetWidth - 8))}px`;
  const below = event.clientY + 18;
  $("tip").style.top = `${below + $("tip").offsetHeight > innerHeight ? event.clientY - $("tip").offsetHeight - 10 : below}px`;
}

function about(position) {
  if (position < P) return `position ${position} · prompt\n${spelled(data.prompt[position])} · id ${data.prompt[position]}`;
  const commits = commitsOf[position - P].map(([step, token, confidence]) => {
    if (token === null) return `\nstep ${step + 1}: masked again`;
    if (step < 0) return `\ngiven by the request: ${spelled(token)} · id ${token}`;
    const sure = confidence === null ? "" : ` · confidence ${confidence.toFixed(3)}`;
    return `\nstep ${step + 1}: ${spelled(token)} · id ${token}${sure}`;
  });
  return `position ${position} · canvas slot ${position - P}${commits.join("") || "\nnever committed"}`;
}

for (const box of [$("canvas"), $("prompt")]) {
  box.onmousemove = (event) => tip(event, event.target.dataset.position ? about(Number(event.target.dataset.position)) : "");
  box.onmouseleave = (event) => tip(event, "");
}
for (const id of pictures) {
  const stepAt = (event) => Math.min(S - 1, Math.floor((event.offsetY / pictureHeight) * S));
  $(id).onclick = (event) => move(stepAt(event) + 1);
  $(id).onmouseleave = (event) => tip(event, "");
  $(id).onmousemove = (event) => {
    const step = stepAt(event);
    if (step < 0) return;
    const took = data.seconds ? `, ${(1000 * data.seconds[step]).toFixed(1)} ms` : "";
    const what = `step ${step + 1}: ${data.rows[step]} rows, ${data.commits[step].length} committed${took}`;
    const position = Math.max(0, Math.min(T - 1, Math.floor((event.offsetX / $(id).clientWidth) * T)));
    tip(event, id === "picture" ? `${what}\n${about(position)}` : what);
  };
}

// --- head of the page ----------------------------------------------------------------------------------------------

const sum = (values) => values.reduce((a, b) => a + b, 0);
const number = (value) => value.toLocaleString("en-US", { maximumFractionDigits: 2 });
const seconds = (value) => (value < 1 ? `${number(1000 * value)} ms` : `${number(value)} s`);

function describe(list, entries) {
  for (const [name, text] of entries) {
    const dt = document.createElement("dt"), dd = document.createElement("dd"), box = document.createElement("div");
    dt.textContent = name;
    dd.textContent = text;
    if (list.id === "figures") box.append(dt, dd);
    list.append(...(list.id === "figures" ? [box] : [dt, dd]));
  }
}

const lengths = (lists) => sum(lists.map((list) => list.length));
const commits = lengths(data.commits), rows = sum(data.rows);
const revoked = lengths(data.revoked), edited = lengths(data.edited);
$("title").textContent = data.id;
const ends = { stop: "ended by a stop token", length: "canvas filled", abort: "aborted or ended by the front end" };
$("subtitle").textContent = [data.model, `policy ${data.options.policy}`, ends[data.finish] ?? "no last line: still running, or cut off"]
  .filter(Boolean).join(" · ");
describe($("figures"), [
  ["prompt", `${number(P)} tokens`], ["canvas", `${number(G)} positions`], ["steps", number(S)],
  ["commits per step", S ? number(commits / S) : "–"],
  ...(data.given.length ? [["given tokens", number(data.given.length)]] : []),
  ...(revoked ? [["masked again", number(revoked)]] : []),
  ...(edited ? [["edited", number(edited)]] : []),
  ["rows refreshed", S ? `${number(rows)} · ${number((100 * rows) / (S * T))} % of full` : "0"],
  ...(data.seconds ? [["time", `${seconds(sum(data.seconds))} · ${seconds(sum(data.seconds) / S)} a step`]] : []),
]);
const isNested = (value) => value !== null && typeof value === "object";
describe($("options"), Object.entries(data.options).map(([k, v]) => [k, isNested(v) ? JSON.stringify(v) : String(v)]));
$("prompt-title").textContent = `Prompt: ${number(P)} tokens`;
$("positions").textContent = `0 – ${number(T - 1)}, canvas from ${number(P)}`;
$("most-rows").textContent = S ? `≤ ${number(scaleOf(data.rows))}` : "";
$("most-ms").textContent = data.seconds ? `≤ ${number(1000 * scaleOf(data.seconds))}` : "";
$("tint-key").hidden = !data.commits.some((list) => list.some((commit) => commit[2] !== null));
$("time-box").hidden = !data.seconds;
$("pictures").classList.toggle("no-time", !data.seconds);
const speeds = { 0.5: "½ ×", 1: "1 ×", 2: "2 ×", 5: "5 ×", ...(data.seconds ? { recorded: "as recorded" } : {}) };
for (const [value, label] of Object.entries(speeds)) $("speed").add(new Option(label, value, value === "1", value === "1"));
$("slider").max = S;

show(S);
new ResizeObserver(drawPictures).observe($("pictures")); // also calls it once, when the page is laid out
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPictures);

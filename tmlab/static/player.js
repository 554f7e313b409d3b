// One replay, scrubbed in the browser: frame, place on the track, inputs and speed follow one index. All data arrives once; nothing goes back
// to the kernel but the index, when the hand lets go of the slider.
const SVG = "http://www.w3.org/2000/svg";
const KEYS = [["accelerate", "↑", 2], ["left", "←", 4], ["brake", "↓", 5], ["right", "→", 6]];  // name, sign, cell of a 3-wide keyboard

const icon = (path) => `<svg viewBox="0 0 16 16" width="14" height="14" fill="currentColor" aria-hidden="true"><path d="${path}"/></svg>`;
const ICONS = { play: icon("M4 2 L14 8 L4 14 Z"), pause: icon("M3 2 H6.5 V14 H3 Z M9.5 2 H13 V14 H9.5 Z"), back: icon("M3 2 H5 V14 H3 Z M14 2 V14 L6 8 Z"), step: icon("M2 2 L10 8 L2 14 Z M11 2 H13 V14 H11 Z") };

const TEMPLATE = `
  <div class="tm-head"><b class="tm-title"></b><span class="tm-facts"></span></div>
  <div class="tm-stage">
    <div class="tm-view"><img class="tm-frame" alt="frame"><div class="tm-inputs">
      <div class="tm-keys"></div>
      <div class="tm-steer" title="steering, right positive"><i></i><span></span></div></div></div>
    <div class="tm-map"><svg></svg><label><input type="checkbox" class="tm-follow"> follow the car</label></div>
  </div>
  <div class="tm-plot"><svg class="tm-speed" preserveAspectRatio="none"></svg><span class="tm-max"></span><span class="tm-now"></span></div>
  <div class="tm-lanes"></div>
  <div class="tm-controls">
    <button class="tm-back" title="one frame back (left arrow)">${ICONS.back}</button>
    <button class="tm-play" title="play or pause (space)">${ICONS.play}</button>
    <button class="tm-step" title="one frame on (right arrow)">${ICONS.step}</button>
    <input type="range" class="tm-slider" min="0" value="0" step="1" aria-label="frame">
    <span class="tm-time"></span>
    <select class="tm-rate" title="playing speed">${[0.1, 0.25, 0.5, 1, 2, 4].map((r) => `<option value="${r}"${r === 1 ? " selected" : ""}>${r}×</option>`).join("")}</select>
  </div>`;

const seconds = (ms) => (ms / 1000).toFixed(2) + " s";
const svg = (name, attrs, parent) => {
  const el = document.createElementNS(SVG, name);
  for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
  return parent.appendChild(el);
};
const note = (el, text) => { el.classList.add("tm-absent"); el.dataset.note = text; };

// ---- the four views; each returns show(i)

function frameView(el, d) {
  const bytes = new Uint8Array(d.jpegs.buffer ?? d.jpegs, d.jpegs.byteOffset ?? 0, d.jpegs.byteLength);
  const urls = new Array(d.n);
  el.addEventListener("error", () => { if (el.src) el.alt = `frame ${el.dataset.index} cannot be decoded`; });
  const show = (i) => {
    urls[i] ??= URL.createObjectURL(new Blob([bytes.subarray(d.offsets[i], d.offsets[i + 1])], { type: "image/jpeg" }));
    el.src = urls[i];
    el.dataset.index = i;
  };
  return [show, () => urls.forEach((u) => URL.revokeObjectURL(u))];
}

// seen from above, so without mirroring: x to the right, z down
function mapView(el, d) {
  const picture = el.querySelector("svg");
  const points = d.position ?? [];
  const all = [...points, ...(d.line ?? [])];
  if (!all.length) { note(el, "positions not recorded"); return () => {}; }
  const xs = all.map((p) => p[0]), zs = all.map((p) => p[1]);
  const [x0, z0] = [Math.min(...xs), Math.min(...zs)];
  const span = Math.max(Math.max(...xs) - x0, Math.max(...zs) - z0, 20);
  const pad = Math.max(0.05 * span, 8), unit = span / 40;
  const whole = [x0 - pad, z0 - pad, Math.max(...xs) - x0 + 2 * pad, Math.max(...zs) - z0 + 2 * pad];
  picture.setAttribute("viewBox", whole.join(" "));
  const poly = (pts, cls) => svg("polyline", { points: pts.map((p) => p.join(",")).join(" "), class: cls }, picture);
  if (d.line) { poly(d.line, "tm-road").setAttribute("stroke-width", 2 * d.half_width_m); poly(d.line, "tm-line"); }
  if (!d.position) { note(el, "positions not recorded"); return () => {}; }
  poly(points, "tm-run");
  const done = poly(points, "tm-done"), run = [0];
  for (let i = 1; i < points.length; i++) run.push(run[i - 1] + Math.hypot(points[i][0] - points[i - 1][0], points[i][1] - points[i - 1][1]));
  const car = svg("g", { class: "tm-car" }, picture);
  svg("path", { d: d.heading ? "M0,-1.5 L1,1.2 L0,.6 L-1,1.2 Z" : "M-.8,0 a.8,.8 0 1 0 1.6,0 a.8,.8 0 1 0 -1.6,0" }, car);
  const follow = el.querySelector(".tm-follow");
  const show = (i) => {
    const [x, z] = points[i], size = follow.checked ? 3 : unit;
    car.setAttribute("transform", `translate(${x} ${z}) rotate(${d.heading ? d.heading[i] : 0}) scale(${size})`);
    done.setAttribute("stroke-width", follow.checked ? 1.2 : unit * 0.5);
    done.setAttribute("stroke-dasharray", `${run[i]} ${run.at(-1) + 1}`);
    picture.setAttribute("viewBox", (follow.checked ? [x - 60, z - 60, 120, 120] : whole).join(" "));
  };
  return show;
}

function inputView(el, d) {
  const keys = el.querySelector(".tm-keys"), bar = el.querySelector(".tm-steer");
  const buttons = KEYS.map(([name, sign, cell]) => {
    const b = keys.appendChild(document.createElement("kbd"));
    Object.assign(b, { textContent: sign, title: name, className: "tm-key" });
    b.dataset.key = name;
    b.style.gridArea = `${Math.ceil(cell / 3)} / ${((cell - 1) % 3) + 1}`;
    return b;
  });
  if (!d.keys) note(keys, "inputs not recorded");
  if (!d.steer) note(bar, "steering not recorded");
  return (i) => {
    if (d.keys) buttons.forEach((b) => b.classList.toggle("on", Boolean(d.keys[b.dataset.key][i])));
    if (d.steer) {
      const s = Math.max(-1, Math.min(1, d.steer[i]));
      bar.firstChild.style.cssText = `left:${50 + 50 * Math.min(s, 0)}%;width:${50 * Math.abs(s)}%`;
      bar.lastChild.textContent = d.steer[i].toFixed(2);
    }
  };
}

function timeView(el, d) {
  const plot = el.querySelector(".tm-speed"), lanes = el.querySelector(".tm-lanes"), t0 = d.time_ms[0], length = Math.max(d.time_ms.at(-1) - t0, 1);
  const cursor = (parent, h) => svg("line", { class: "tm-cursor", y1: 0, y2: h }, parent);
  const top = d.speed_kmh ? Math.max(10, Math.ceil(Math.max(...d.speed_kmh) / 50) * 50) : 1;
  plot.setAttribute("viewBox", `0 0 ${length} ${top}`);
  if (d.speed_kmh) {
    for (let v = 50; v < top; v += top > 250 ? 100 : 50) svg("line", { class: "tm-grid", x1: 0, x2: length, y1: top - v, y2: top - v }, plot);
    const line = d.speed_kmh.map((v, i) => `${d.time_ms[i] - t0},${(top - v).toFixed(2)}`).join(" ");
    svg("polygon", { points: `0,${top} ${line} ${length},${top}`, class: "tm-area" }, plot);
    svg("polyline", { points: line, class: "tm-curve" }, plot);
    el.querySelector(".tm-max").textContent = `${top} km/h`;
  } else note(plot.parentNode, "speed not recorded");
  const cursors = [cursor(plot, top)];
  for (const [name, sign] of d.keys ? KEYS : []) {
    const lane = lanes.appendChild(document.createElement("div"));
    lane.innerHTML = `<span>${sign}</span>`;
    const strip = svg("svg", { viewBox: `0 0 ${length} 1`, preserveAspectRatio: "none" }, lane);
    const pressed = d.keys[name], end = (i) => (i + 1 < d.n ? d.time_ms[i + 1] : d.time_ms[i] + 50) - t0;
    for (let i = 0; i < d.n; i++) {
      if (!pressed[i]) continue;
      const from = i;
      while (i + 1 < d.n && pressed[i + 1]) i++;
      svg("rect", { x: d.time_ms[from] - t0, width: end(i) - d.time_ms[from] + t0, y: 0, height: 1, class: `tm-${name}` }, strip);
    }
    cursors.push(cursor(strip, 1));
  }
  const now = el.querySelector(".tm-now");
  return (i) => {
    const x = d.time_ms[i] - t0;
    cursors.forEach((c) => { c.setAttribute("x1", x); c.setAttribute("x2", x); });
    if (d.speed_kmh) now.textContent = `${d.speed_kmh[i].toFixed(0)} km/h`;
  };
}

// ---- one index moves them all

function mount(root, d, first, onRest) {
  root.innerHTML = TEMPLATE;
  const $ = (cls) => root.querySelector(cls), slider = $(".tm-slider"), last = d.n - 1;
  $(".tm-title").textContent = d.title;
  root.style.setProperty("--tm-aspect", d.aspect);
  $(".tm-facts").textContent = d.facts.join(" · ");
  slider.max = last;
  const [showFrame, freeFrames] = frameView($(".tm-frame"), d);
  const views = [showFrame, mapView($(".tm-map"), d), inputView($(".tm-inputs"), d), timeView(root, d)];
  let index = 0, playing = null;

  const show = (i) => {
    index = Math.max(0, Math.min(last, Math.round(i)));
    slider.value = index;
    $(".tm-time").textContent = `${seconds(d.time_ms[index])} of ${seconds(d.time_ms[last])} · frame ${index + 1}/${d.n}`;
    views.forEach((view) => view(index));
  };
  const stop = () => {
    if (playing !== null) cancelAnimationFrame(playing);
    playing = null;
    $(".tm-play").innerHTML = ICONS.play;
    onRest(index);
  };
  const play = () => {
    if (index === last) show(0);
    let clock = d.time_ms[index], before = performance.now();
    const tick = (now) => {
      clock += (now - before) * Number($(".tm-rate").value);
      before = now;
      let i = index;
      while (i < last && d.time_ms[i + 1] <= clock) i++;
      if (i !== index) show(i);
      if (index === last) stop(); else playing = requestAnimationFrame(tick);
    };
    $(".tm-play").innerHTML = ICONS.pause;
    playing = requestAnimationFrame(tick);
  };
  const toggle = () => (playing === null ? play() : stop());
  const move = (by) => { stop(); show(index + by); onRest(index); };

  slider.addEventListener("input", () => { const i = Number(slider.value); if (playing !== null) stop(); show(i); });
  slider.addEventListener("change", () => onRest(index));
  $(".tm-play").addEventListener("click", toggle);
  $(".tm-back").addEventListener("click", () => move(-1));
  $(".tm-step").addEventListener("click", () => move(1));
  $(".tm-follow").addEventListener("change", () => show(index));
  for (const area of [$(".tm-speed"), $(".tm-lanes")]) area.addEventListener("pointerdown", (e) => {
    const box = $(".tm-speed").getBoundingClientRect(), t = d.time_ms[0] + ((e.clientX - box.left) / box.width) * (d.time_ms[last] - d.time_ms[0]);
    const i = d.time_ms.findIndex((x) => x > t);
    move((i < 0 ? last : Math.max(0, i - 1)) - index);
  });
  root.addEventListener("keydown", (e) => {
    const by = { ArrowLeft: e.shiftKey ? -20 : -1, ArrowRight: e.shiftKey ? 20 : 1, Home: -d.n, End: d.n }[e.key];
    if (e.target.tagName === "SELECT" || (by === undefined && e.key !== " ")) return;
    e.preventDefault();
    e.stopPropagation();
    by === undefined ? toggle() : move(by);
  });
  show(first);
  return { show, free: () => { if (playing !== null) cancelAnimationFrame(playing); freeFrames(); } };
}

function render({ model, el }) {
  const root = el.appendChild(document.createElement("div"));
  root.className = "tm-player";
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true";  // JupyterLab: keys belong to the player while it has the focus
  let player = null;
  const rest = (i) => { if (model.get("index") !== i) { model.set("index", i); model.save_changes(); } };
  const start = () => { player?.free(); player = mount(root, model.get("data"), model.get("index"), rest); };
  const jump = () => player.show(model.get("index"));
  start();
  model.on("change:data", start);
  model.on("change:index", jump);
  return () => { model.off("change:data", start); model.off("change:index", jump); player.free(); };
}
export default { render };

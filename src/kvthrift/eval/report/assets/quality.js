// Quality against bytes held: marks with intervals, lines of each method, the front, the controls' area, the full cache.

const SYMBOLS = [["circle", "●"], ["square", "■"], ["diamond", "◆"], ["triangle-up", "▲"], ["cross", "✚"],
  ["star", "★"], ["hexagon", "⬢"], ["triangle-down", "▼"]];  // as marks, and as text
const SPREAD = 0.022;  // powers of ten between marks of one size,
const SPREAD_MOST = 0.07;  // and between the first and the last of them
const SAME = 1.03;  // sizes closer than this factor count as one

const isControl = (method) => (DATA.controls ?? []).includes(method);

function symbolOf(method) {
  if (method === "full") return ["line-ew-open", "━"];
  if (isControl(method)) return method === "random" ? ["x-thin-open", "✕"] : ["asterisk-open", "✳"];
  return SYMBOLS[Math.max(DATA.methods.filter((name) => !isControl(name)).indexOf(method), 0) % SYMBOLS.length];
}

/** Points that no smaller or equal one is better than, from small to large. */
function frontOf(points) {
  const out = [];
  for (const point of [...points].sort((a, b) => a.bytes - b.bytes || b.mean - a.mean))
    if (!out.length || point.mean > out.at(-1).mean) out.push(point);
  return out;
}

function pointsOf(group) {
  const found = group.points[taskOf(group)];
  return group.arms.map((arm, place) => ({ ...arm, ...found[place] }))
    .filter((point) => point.bytes !== null && armShown(group, point));
}

function quality(group) {
  const points = pointsOf(group);
  const full = points.find((point) => point.method === "full");
  const others = points.filter((point) => point !== full);
  const methods = [...new Set(others.map((point) => point.method))];
  const sizes = points.map((point) => point.bytes);
  const [least, most] = sizes.length ? [Math.min(...sizes), Math.max(...sizes)] : [1, 10];
  const traces = [];
  const controls = frontOf(others.filter((point) => point.control));
  if (controls.length) traces.push(stepped(controls, most, { line: { width: 0, shape: "hv" }, fill: "tozeroy",
    fillcolor: theme("shade"), name: "controls", hoverinfo: "skip" }));
  const front = frontOf(others);
  if (front.length) traces.push(stepped(front, most, { line: { width: 2.5, shape: "hv", color: theme("soft") },
    name: "front", hoverinfo: "skip" }));
  for (const point of others) point.beside = besides(point, others, methods);
  for (const method of methods) traces.push(marks(group, method, others, front));
  if (full) traces.push(marks(group, "full", [full], []));
  return { traces, layout: qualityLayout(full, least, most) };
}

function stepped(front, most, style) {
  return { type: "scatter", mode: "lines", x: [...front.map((point) => point.bytes), most],
    y: [...front.map((point) => point.mean), front.at(-1).mean], ...style };
}

/** How far, in powers of ten, a mark is moved so that marks of one size stand side by side. */
function besides(point, points, methods) {
  const peers = points.filter((other) => other.bytes < point.bytes * SAME && point.bytes < other.bytes * SAME);
  peers.sort((a, b) => methods.indexOf(a.method) - methods.indexOf(b.method));
  const step = Math.min(SPREAD, SPREAD_MOST / Math.max(peers.length - 1, 1));
  return (peers.indexOf(point) - (peers.length - 1) / 2) * step;
}

function marks(group, method, points, front) {
  const mine = points.filter((point) => point.method === method).sort((a, b) => a.bytes - b.bytes);
  const tone = colour(method);
  return {
    type: "scatter", mode: isControl(method) ? "markers" : "lines+markers+text", name: method,
    x: mine.map((point) => point.bytes * 10 ** (point.beside ?? 0)), y: mine.map((point) => point.mean),
    error_y: { type: "data", symmetric: false, color: tone, thickness: 1.2, width: 3,
      array: mine.map((point) => (point.high ?? point.mean) - point.mean),
      arrayminus: mine.map((point) => point.mean - (point.low ?? point.mean)) },
    line: { color: tone, width: 1, dash: "dot" },
    marker: { color: tone, size: 10, symbol: symbolOf(method)[0],
      line: { width: isControl(method) ? 2 : 1, color: isControl(method) ? tone : theme("raised") } },
    text: mine.map((point) => (front.includes(point) ? `<b>${point.budget}</b>` : "")), textposition: "top left",
    textfont: { color: tone, size: 12 }, cliponaxis: false,
    hovertemplate: "<b>%{customdata[0]}</b><br>score %{customdata[1]}<br>%{customdata[2]} held (%{customdata[3]} of full)"
      + "<br>question " + group.question + ", %{customdata[4]} samples<extra></extra>",
    customdata: mine.map((point) => [point.arm, interval(point), bytes(point.bytes), percent(point.share, 1), point.samples]),
  };
}

const interval = (point) => point.low === null ? point.mean.toFixed(1)
  : `${point.mean.toFixed(1)} [${point.low.toFixed(1)}, ${point.high.toFixed(1)}]`;

/** Powers of two along an axis of bytes. */
function byteTicks(least, most) {
  const ticks = [];
  const step = Math.log2(most / least) > 7 ? 2 : 1;
  for (let power = Math.floor(Math.log2(least)); power <= Math.ceil(Math.log2(most)); power += step) ticks.push(2 ** power);
  return { tickvals: ticks, ticktext: ticks.map((tick) => bytes(tick).replace(/\.00 /, " ")) };
}

function qualityLayout(full, least, most) {
  const line = full ? { type: "line", xref: "paper", x0: 0, x1: 1, y0: full.mean, y1: full.mean,
    line: { color: theme("ink"), width: 1.5, dash: "dash" } } : null;
  const label = full ? { xref: "paper", x: 0, y: full.mean, yshift: 9, text: "full cache", showarrow: false, xanchor: "left",
    font: { color: theme("ink"), size: 12 } } : null;
  return {
    height: 440, paperHeight: 330, shapes: line ? [line] : [], annotations: label ? [label] : [],
    xaxis: axis("bytes held (log scale)", { type: "log", range: [Math.log10(least) - 0.12, Math.log10(most) + 0.12], ...byteTicks(least, most) }),
    yaxis: axis("score, 0 to 100", { range: [-4, 109], tickvals: [0, 20, 40, 60, 80, 100] }),
  };
}

function showKey(group) {
  const shown = new Set(pointsOf(group).map((point) => point.method));
  const items = DATA.methods.filter((method) => shown.has(method) && method !== "full").map((method) => {
    const mark = make("i", { class: "swatch", style: `color:${colour(method)}` }, symbolOf(method)[1]);
    return make("li", {}, mark, isControl(method) ? `${method} (control)` : method);
  });
  document.getElementById(`${group.id}-key`).replaceChildren(...items);
}

function showQuality() {
  for (const group of GROUPS.values()) {
    if (!groupShown(group)) { DRAWN.delete(`${group.id}-quality`); continue; }
    figure(`${group.id}-quality`, () => { showKey(group); return quality(group); });
    const front = frontOf(pointsOf(group).filter((point) => point.method !== "full"));
    document.getElementById(`${group.id}-front`).textContent = front.length
      ? `On the front (question ${group.question}): ${front.map((p) => `${p.arm} ${p.mean.toFixed(1)} with ${bytes(p.bytes)}`).join("; ")}.`
      : "Nothing to draw.";
  }
}

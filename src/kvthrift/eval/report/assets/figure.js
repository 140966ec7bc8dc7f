// Plots on the page: drawn again when the theme, the paper or what is shown changes.

let Plotly = null;
const DRAWN = new Map();  // node id -> function that gives {traces, layout}
const PAPER_WIDTH = 660;  // CSS pixels that fit on a portrait page
const NARROW = 520;  // CSS pixels below which a plot is set as on a phone

const CONFIG = { displayModeBar: false, responsive: true, showTips: false, doubleClick: false };

/** Keep how a plot is drawn, and draw it. */
function figure(id, describe) {
  DRAWN.set(id, describe);
  draw(id);
}

function draw(id) {
  const node = document.getElementById(id);
  if (!Plotly || !node) return;
  const paper = document.documentElement.classList.contains("paper");
  const { traces, layout } = DRAWN.get(id)(!paper && node.clientWidth < NARROW);
  const height = (paper && layout.paperHeight) || layout.height;
  node.style.minHeight = `${height}px`;
  const size = paper ? { width: PAPER_WIDTH, autosize: false } : { autosize: true };
  Plotly.react(node, traces, { ...common(), ...layout, font: { ...common().font, ...layout.font }, height, ...size }, CONFIG);
}

const drawAll = () => DRAWN.forEach((_, id) => draw(id));

function common() {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
    showlegend: false, margin: { l: 56, r: 16, t: 16, b: 48 }, transition: { duration: 0 },
    font: { family: theme("sans"), size: 13, color: theme("soft") },
    hoverlabel: { bgcolor: theme("raised"), bordercolor: theme("line"), font: { color: theme("ink"), size: 13 } },
  };
}

/** What all axes share. */
const axis = (title, more = {}) => ({
  title: { text: title, standoff: 8 }, gridcolor: theme("grid"), linecolor: theme("line"), zeroline: false,
  ticks: "outside", tickcolor: theme("line"), ticklen: 4, fixedrange: true, automargin: true, ...more,
});

/** Colours from nothing to everything. */
const scale = () => [0, 0.25, 0.5, 0.75, 1].map((place, step) => [place, theme(`heat-${step}`)]);

/** A colour for each method, the same everywhere on the page; grey for the controls. */
function colour(method) {
  if (method === "full") return theme("ink");
  if ((DATA.controls ?? []).includes(method)) return theme("muted");
  const place = Math.max((DATA.methods ?? [method]).filter((name) => !DATA.controls?.includes(name)).indexOf(method), 0);
  return theme(`hue-${place % 8}`);
}

/** Draw on paper in light colours, at a width that fits. */
function watchTheme() {
  const paper = (on) => {
    document.documentElement.classList.toggle("paper", on);
    drawAll();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", (event) => paper(event.matches));
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
}

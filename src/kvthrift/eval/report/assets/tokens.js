// One text painted by how many heads keep each token, and the panel that says which heads they are.

const kept = { bits: null, arm: null, text: null, nodes: [], shares: null, at: -1 };

const keeps = (layer, head, token) => {
  const place = (layer * kept.arm.heads + head) * kept.text.tokens.length + token;
  return (kept.bits[place >> 3] >> (7 - (place & 7))) & 1;
};

/** Paint a text, the answer chosen; ``bits`` are [L, H, T] in C order, the first in the highest bit. */
function paint(text, arm, bits) {
  Object.assign(kept, { bits, arm, text, at: -1 });
  const pairs = arm.layers.length * arm.heads;
  const counts = new Uint32Array(text.tokens.length);
  for (let layer = 0; layer < arm.layers.length; layer++)
    for (let head = 0; head < arm.heads; head++)
      for (let token = 0; token < counts.length; token++) counts[token] += keeps(layer, head, token);
  kept.shares = Float64Array.from(counts, (count) => count / pairs);
  kept.nodes = text.tokens.map(piece);
  one("#painted").replaceChildren(...kept.nodes);
  const spans = text.spans.filter(([start, stop]) => start < stop && stop <= kept.nodes.length);
  for (const [start, stop] of spans) {
    const frame = make("span", { class: "gold" });
    kept.nodes[start].before(frame);
    frame.append(...kept.nodes.slice(start, stop));
  }
  one("#detail-grid").replaceChildren(headGrid());
  const first = spans[0]?.[0] ?? 0;
  choose(first);
  const box = one("#painted");
  box.scrollTop = kept.nodes[first].offsetTop - box.offsetTop - box.clientHeight / 3;
}

function piece(token, place) {
  return make("span", { class: `token k${Math.ceil(Math.sqrt(kept.shares[place]) * 10)}`, "data-at": place }, token);
}

/** Rectangles, one for each head of each layer, to be switched on and off. */
function headGrid() {
  const { layers, heads } = kept.arm;
  const space = "http://www.w3.org/2000/svg";
  const size = 10, step = 12, left = 26, top = 16;
  const svg = document.createElementNS(space, "svg");
  const tall = layers.length > 2 * heads;  // many layers, few heads: layers along the top
  const [wide, high] = tall ? [layers.length, heads] : [heads, layers.length];
  svg.setAttribute("viewBox", `0 0 ${left + wide * step} ${top + high * step}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${layers.length} layers by ${heads} heads; filled where the head keeps the token`);
  const put = (name, attributes, text) => {
    const node = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  layers.forEach((number, layer) => {
    const along = layer * step + size / 2;
    if (layer % 5 === 0) put("text", tall ? { x: left + along, y: 10, "text-anchor": "middle" }
      : { x: left - 4, y: top + along + 3, "text-anchor": "end" }, number);
    for (let head = 0; head < heads; head++) {
      const [x, y] = tall ? [layer, head] : [head, layer];
      put("rect", { x: left + x * step, y: top + y * step, width: size, height: size, rx: 2, class: "head",
        "data-layer": layer, "data-head": head });
    }
  });
  put("text", tall ? { x: 0, y: top + 9 } : { x: left, y: 10 }, tall ? "head" : "heads; layers down");
  return svg;
}

/** Show which heads keep a token. */
function choose(place) {
  const node = kept.nodes[place];
  if (!node) return;
  one("#painted .token.now")?.classList.remove("now");
  node.classList.add("now");
  kept.at = place;
  for (const cell of all("#detail-grid .head"))
    cell.classList.toggle("on", Boolean(keeps(+cell.dataset.layer, +cell.dataset.head, place)));
  const word = kept.text.tokens[place].replaceAll("\n", "⏎");
  one("#detail-token").replaceChildren(make("mark", {}, word || "∅"), ` token ${place}`);
  one("#detail-said").textContent = said(place);
}

function said(place) {
  const { layers, heads } = kept.arm;
  const by = layers.map((number, layer) => {
    const found = Array.from({ length: heads }, (_, head) => head).filter((head) => keeps(layer, head, place));
    return [number, found];
  }).filter(([, found]) => found.length);
  const count = by.reduce((sum, [, found]) => sum + found.length, 0);
  if (!count) return "Gone from every head of every layer.";
  const whole = layers.length * heads;
  if (count === whole) return `Kept by all ${whole} heads.`;
  return `Kept by ${count} of ${whole} heads (${percent(count / whole)}), in layers ${ranges(by.map(([number]) => number))}.`;
}

/** The token above or below: the nearest one a line away. */
function nextLine(place, way) {
  const pieces = kept.nodes;
  const from = pieces[place].getBoundingClientRect();
  let best = place, near = Infinity, line = null;
  for (let other = place + way; pieces[other]; other += way) {
    const box = pieces[other].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 4) break;
    const far = Math.abs(box.left - from.left);
    if (far < near) [best, near] = [other, far];
  }
  return best;
}

function watchTokens() {
  const box = one("#painted");
  if (!box) return;
  const under = (event) => event.target.closest?.("[data-at]");
  for (const kind of ["pointerover", "click"])
    box.addEventListener(kind, (event) => under(event) && choose(+under(event).dataset.at));
  box.addEventListener("keydown", (event) => {
    const last = kept.nodes.length - 1, at = Math.max(kept.at, 0);
    const moves = { ArrowRight: () => Math.min(at + 1, last), ArrowLeft: () => Math.max(at - 1, 0), Home: () => 0,
      End: () => last, ArrowDown: () => nextLine(at, 1), ArrowUp: () => nextLine(at, -1) };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(moves[event.key]());
    kept.nodes[kept.at].scrollIntoView({ block: "nearest" });
  });
}

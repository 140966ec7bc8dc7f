// What every other script uses: the page's data, the plot library, colours of the theme, and small builders.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** An element with attributes and children; texts are texts, never markup. */
function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Bytes behind base64 of zlib. */
async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Run the plot library, which is packed into the page; null where the browser cannot unpack it. */
async function unpackLibrary() {
  if (!("DecompressionStream" in window)) return null;
  const code = new TextDecoder().decode(await inflate(one("#library").textContent.trim()));
  document.head.append(make("script", {}, code));
  return window.Plotly ?? null;
}

const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** "1.5 MiB", spelled as everywhere in kvthrift. */
function bytes(count) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (Math.abs(count) < 1024) return unit === "B" ? `${count.toFixed(0)} B` : `${count.toFixed(2)} ${unit}`;
    count /= 1024;
  }
  return `${count.toFixed(2)} GiB`;
}

/** Numbers in a row as ranges: 0-3, 7. */
function ranges(numbers) {
  const parts = [];
  for (const number of numbers) {
    const last = parts.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([start, stop]) => (start === stop ? `${start}` : `${start}-${stop}`)).join(", ");
}

/** Replace the options of a select box, and keep what is chosen if it is still there. */
function offer(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => value === before)) select.value = before;
  return select.value;
}

/** A table with names down the side and along the top. */
function crossTable(table, caption, corner, columns, rows) {
  const head = make("tr", {}, make("th", { scope: "col" }, corner),
    ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([name, cells]) => make("tr", {}, make("th", { scope: "row" }, name),
    ...cells.map((cell) => make("td", {}, cell))));
  table.replaceChildren(make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
}

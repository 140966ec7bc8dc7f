// What happens when the page is read.

function showSwatches() {
  for (const mark of all(".side [data-method]")) {
    mark.style.color = colour(mark.dataset.method);
    mark.textContent = symbolOf(mark.dataset.method)[1];
  }
}

async function begin() {
  watchFilters();
  watchTables();
  watchNeedles();
  watchInside();
  listeners.push(showTables, showQuality, showAgreement, showNeedles, showInside, showStudies);
  tell();
  showSwatches();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showSwatches);
  Plotly = await unpackLibrary();
  if (!Plotly) for (const node of all(".canvas")) node.textContent = "Plots need a newer browser; the tables have all numbers.";
  watchTheme();
  drawAll();
  document.documentElement.classList.add("ready");
}

// The section on what caches held: choice of text and arm, budgets by layer and head, the painted text.

const INSIDE = DATA.inside ?? { texts: [], arms: [] };

let turns = 0;

const nameOfText = (text, many) =>
  `${many ? `${text.run}: ` : ""}${text.task} ${text.sample}, question ${text.question}, ${text.tokens.length} tokens`;

/** Offer the texts and arms that the filters let through. */
function showInside() {
  if (!one("#inside-shown")) return;
  const arms = INSIDE.arms.filter((arm) => passes({ ...arm, ...INSIDE.texts[arm.text], arm: arm.arm }));
  const places = [...new Set(arms.map((arm) => arm.text))];
  one("#inside-none").hidden = places.length > 0;
  one("#inside-shown").hidden = places.length === 0;
  if (!places.length) return;
  const many = new Set(INSIDE.texts.map((text) => text.run)).size > 1;
  const place = +offer(one("#pick-text"), places.map((at) => [`${at}`, nameOfText(INSIDE.texts[at], many)]));
  const mine = arms.filter((arm) => arm.text === place);
  const names = mine.map((arm) => arm.arm);
  const before = one("#pick-arm").value;
  offer(one("#pick-arm"), names.map((name) => [name, name]));
  one("#pick-arm").value = names.includes(before) ? before : favourite(names);
  showArm(INSIDE.texts[place], mine[names.indexOf(one("#pick-arm").value)]);
}

async function showArm(text, arm) {
  for (const node of all("#inside .asked")) node.textContent = `(${arm.arm}, question ${text.question})`;
  one("#answer-full").textContent = text.full_answer.trim() || "(nothing)";
  one("#answer-own").textContent = arm.answer.trim() || "(nothing)";
  one("#answer-name").textContent = arm.arm;
  showBudgets(arm);
  if (!("DecompressionStream" in window)) return;
  const turn = ++turns;
  const bits = await inflate(arm.kept);
  if (turn === turns) paint(text, arm, bits);  // unless another was chosen meanwhile
}

function showBudgets(arm) {
  const heads = Array.from({ length: arm.heads }, (_, head) => `${head}`);
  const counts = arm.lengths.flat();
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  const z = heads.map((_, head) => arm.lengths.map((layer) => layer[head]));
  const said = low === high ? `Every head of every layer holds ${low} entries.`
    : `Heads hold ${low} to ${high} entries, ${Math.round(counts.reduce((a, b) => a + b, 0) / counts.length)} on average.`;
  one("#budgets-said").textContent = said;
  one("#budgets").setAttribute("aria-label", `Heat map of entries held by layer and head of ${arm.arm}. ${said}`);
  figure("budgets", heatMap({
    x: arm.layers.map(String), y: heads, z, xTitle: "layer", yTitle: "KV head", unit: "entries", low: 0, high,
    hover: "layer %{x}, head %{y}<br><b>%{z} entries</b><extra></extra>", height: Math.min(110 + 26 * arm.heads, 420),
    xMore: { nticks: 12, tickangle: 0 },
  }));
  crossTable(one("#budgets-table"), `Entries held by ${arm.arm}`, "layer", heads.map((head) => `head ${head}`),
    arm.layers.map((number, layer) => [`${number}`, arm.lengths[layer].map(String)]));
}

function watchInside() {
  for (const select of all("#pick-text, #pick-arm")) select.addEventListener("change", showInside);
  watchTokens();
}

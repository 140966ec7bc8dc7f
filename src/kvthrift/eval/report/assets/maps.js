// Heat maps of runs: agreement by position in the answer, and needles by depth and length.

function showAgreement() {
  for (const group of GROUPS.values()) {
    const found = group.agreement, id = `${group.id}-agreement`;
    if (!found) continue;
    if (!groupShown(group)) { DRAWN.delete(id); continue; }
    const rows = group.arms.map((arm, place) => [arm, found.arms[taskOf(group)][place]]).filter(([arm]) => armShown(group, arm));
    const count = rows[0]?.[1].length ?? 0;
    const x = Array.from({ length: count }, (_, place) => place * found.width + 1);
    const z = rows.map(([, shares]) => shares.map((share) => (share === null ? null : 100 * share)));
    const answers = found.answers[taskOf(group)];
    figure(id, heatMap({
      x, y: rows.map(([arm]) => arm.arm), z, xTitle: `token of the answer`, yTitle: "", unit: "agree, %",
      low: 0, high: 100, xType: "linear", more: rows.map(() => answers), height: 96 + 26 * Math.max(rows.length, 2),
      hover: "<b>%{y}</b><br>token %{x}: %{z:.0f}% agree<br>%{customdata} answers<extra></extra>", xMore: { dtick: tickStep(count * found.width), tick0: 1, tickangle: 0 },
    }));
    crossTable(document.getElementById(`${id}-table`), `Share of answers that agree, by token (question ${group.question})`, "arm",
      x.map(String), rows.map(([arm, shares]) => [arm.arm, shares.map((share) => (share === null ? "-" : percent(share)))]));
  }
}

const tickStep = (count) => (count <= 12 ? 1 : count <= 40 ? 5 : count <= 80 ? 10 : count <= 200 ? 20 : 50);

const whatOf = (one) => `${one.model}, question ${one.question}`;

function showNeedles() {
  if (!one("#needles")) return;
  const found = DATA.needles.filter((needle) => {
    const arm = DATA.arms[needle.arm];
    return needle.arm === "full" ? passes({ run: needle.run, question: needle.question, task: needle.task })
      : passes({ ...needle, method: arm.method, budget: arm.budget });
  });
  const what = offer(one("#needle-what"), [...new Set(found.map(whatOf))].map((name) => [name, name]));
  const mine = found.filter((needle) => whatOf(needle) === what);
  const names = [...new Set(mine.map((needle) => needle.arm))].filter((name) => name !== "full");
  const before = one("#needle-arm").value;
  offer(one("#needle-arm"), names.map((name) => [name, name]));
  one("#needle-arm").value = names.includes(before) ? before : favourite(names) ?? "";
  one("#needles-none").hidden = names.length > 0;
  one("#needles-shown").hidden = names.length === 0;
  if (!names.length) return;
  needleMap("own", one("#needle-arm").value, mine);
  needleMap("full", "full", mine);
}

/** Depths as they are, or in tenths where there are many. */
function depthNames(needles) {
  const exact = new Set(needles.map((needle) => needle.depth));
  const place = exact.size <= 12 ? (depth) => depth : (depth) => Math.round(10 * depth) / 10;
  return (depth) => Math.round(100 * place(depth));
}

function needleMap(which, arm, needles) {
  const depthOf = depthNames(needles);
  const depths = [...new Set(needles.map((needle) => depthOf(needle.depth)))].sort((a, b) => a - b);
  const lengths = [...new Set(needles.map((needle) => needle.length))].sort((a, b) => a - b);
  const mine = needles.filter((needle) => needle.arm === arm);
  const fields = depths.map((depth) => lengths.map((length) => {
    const here = mine.filter((needle) => depthOf(needle.depth) === depth && needle.length === length);
    const count = here.reduce((sum, needle) => sum + needle.samples, 0);
    return { count, mean: count ? here.reduce((sum, needle) => sum + needle.score * needle.samples, 0) / count : null };
  }));
  const name = arm === "full" ? "full cache" : arm, question = needles[0].question;
  document.getElementById(`needle-${which}-name`).textContent = `${name} (question ${question})`;
  document.getElementById(`needle-${which}`).setAttribute("aria-label",
    `Heat map of scores by depth and length of ${name}, question ${question}; the table below it has the numbers`);
  const text = fields.map((row) => row.map((field) => (field.mean === null ? "" : field.mean.toFixed(0))));
  figure(`needle-${which}`, heatMap({
    x: lengths.map((length) => length.toLocaleString("en")), y: depths.map((depth) => `${depth}%`), z: fields.map((row) => row.map((field) => field.mean)),
    text, more: fields.map((row) => row.map((field) => field.count)), xTitle: "tokens", yTitle: "depth of the needle", unit: "score",
    low: 0, high: 100, gap: 2, height: Math.max(260, 110 + 30 * depths.length),
    hover: "depth %{y}, %{x} tokens<br><b>score %{z:.1f}</b>, %{customdata} samples<extra></extra>",
  }));
  crossTable(document.getElementById(`needle-${which}-table`), `Mean score of ${name} (question ${question})`, "depth",
    lengths.map((length) => `${length} tokens`), depths.map((depth, row) => [`${depth}%`, text[row].map((cell) => cell || "-")]));
}

function watchNeedles() {
  for (const select of all("#needle-what, #needle-arm")) select.addEventListener("change", showNeedles);
}

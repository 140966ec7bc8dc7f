// Tables: rows of arms that are shown, columns of the task that is looked at, sorted by a click or a key.

const GROUPS = new Map((DATA.groups ?? []).map((group) => [group.id, group]));
const TABLES = all("table[data-section]");

const NAMES = 2;  // columns before those of a section: arm and budget

const groupOf = (node) => GROUPS.get(node.dataset.group);

/** The task whose cells a group shows: "all" where the one looked at is not its own. */
const taskOf = (group) => (group.points[task()] ? task() : "all");

const armShown = (group, arm) =>
  passes({ run: group.run, question: group.question, method: arm.method, budget: arm.method === "full" ? undefined : arm.budget });

const groupShown = (group) =>
  passes({ run: group.run, question: group.question }) && (task() === "all" || group.tasks.includes(task()));

/** The arm to show first among some: of no control, with the best score, and of those the smallest. */
function favourite(names) {
  const group = [...GROUPS.values()].find(groupShown);
  const arms = (group?.arms ?? []).map((arm, place) => ({ ...arm, ...group.points.all[place] }));
  const fit = arms.filter((arm) => !arm.control && names.includes(arm.arm));
  fit.sort((a, b) => b.mean - a.mean || a.bytes - b.bytes);
  return fit[0]?.arm ?? names.find((name) => name !== "full") ?? names[0];
}

function showTables() {
  for (const table of TABLES) {
    const group = groupOf(table), section = group.sections[+table.dataset.section], now = taskOf(group);
    const only = task() !== "all" || group.tasks.length === 1;
    one(".task-name", table).textContent = only ? (now === "all" ? group.tasks[0] : now) : "all tasks";
    for (const row of all("tbody tr", table)) {
      const arm = +row.dataset.arm;
      row.hidden = !armShown(group, group.arms[arm]);
      if (table.dataset.task !== now) section.cells[now][arm].forEach((cell, place) => fillCell(row.cells[place + NAMES], cell));
    }
    table.dataset.task = now;
    for (const node of all("[data-of]", table)) node.hidden = task() !== "all";
    one("thead tr", table).querySelectorAll(".sort").forEach((button, place) => {
      if (section.columns[place - NAMES]?.title === "mean") button.textContent = now === "all" ? "mean" : "score";
    });
    const sorted = one("[aria-sort]", table);
    if (sorted) sortBy(table, sorted.cellIndex, sorted.getAttribute("aria-sort"));
  }
  for (const [id, group] of GROUPS) document.getElementById(id).hidden = !groupShown(group);
  for (const item of all(".failures li")) item.hidden = !passes(item.dataset);
  tellCount();
}

function fillCell(node, cell) {
  const [text, note, , bar] = cell;
  node.replaceChildren(text);
  if (note) node.append(make("small", {}, note));
  if (bar !== null) node.append(make("span", { class: "bar", style: `width:${bar}%` }));
}

function tellCount() {
  const groups = [...GROUPS.values()];
  const names = (test) => new Set(groups.flatMap((group) => group.arms.filter((arm) => test(group, arm)).map((arm) => arm.arm)));
  const shown = names((group, arm) => groupShown(group) && armShown(group, arm)).size;
  if (one("#count")) one("#count").textContent = `${shown} of ${plural(names(() => true).size, "arm")} shown`;
  if (one("#nothing")) one("#nothing").hidden = groups.some(groupShown);
}

/** What a row is sorted by; methods by name, budgets in the order they were asked for, with the full cache behind. */
function keyOf(table, row, column) {
  const group = groupOf(table), arm = group.arms[+row.dataset.arm];
  if (column === 0) return [...DATA.methods].sort().indexOf(arm.method);
  if (column === 1) return arm.method === "full" ? DATA.budgets.length : DATA.budgets.indexOf(arm.budget);
  return group.sections[+table.dataset.section].cells[taskOf(group)][+row.dataset.arm][column - NAMES][2];
}

function sortBy(table, column, way) {
  const sign = way === "ascending" ? 1 : -1;
  const rows = all("tbody tr", table).map((row) => [keyOf(table, row, column), row]);
  rows.sort(([a, first], [b, second]) => {
    if (a === null || b === null) return (a === null) - (b === null);  // nothing stands last, either way
    return sign * (a - b) || +first.dataset.arm - +second.dataset.arm;
  });
  one("tbody", table).append(...rows.map(([, row]) => row));
  for (const head of all("thead th", table)) head.removeAttribute("aria-sort");
  one("thead tr", table).cells[column].setAttribute("aria-sort", way);
}

function watchTables() {
  for (const table of TABLES)
    for (const button of all(".sort", table))
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const first = head.cellIndex < NAMES ? "ascending" : "descending";
        const turned = first === "ascending" ? "descending" : "ascending";
        sortBy(table, head.cellIndex, head.getAttribute("aria-sort") === first ? turned : first);
      });
}

// What is shown: methods, budgets, runs and questions by checkbox, one task or all by select box. Kept in the address.

const FORM = one("#filters");
const KINDS = ["run", "question", "method", "budget"];
const listeners = [];

/** Values of a kind that are switched off. */
const off = (kind) => all(`input[name="${kind}"]:not(:checked)`, FORM ?? document).map((box) => box.value);

/** Whether something with any of the kinds as names is shown. */
function passes(thing) {
  if (!FORM) return true;
  const hidden = KINDS.some((kind) => thing[kind] !== undefined && off(kind).includes(thing[kind]));
  return !hidden && (thing.task === undefined || task() === "all" || thing.task === task());
}

/** The task that is looked at, or "all". */
const task = () => one("#filter-task")?.value ?? "all";

function remember() {
  const parts = new URLSearchParams();
  for (const kind of KINDS) for (const value of off(kind)) parts.append(`no-${kind}`, value);
  if (task() !== "all") parts.set("task", task());
  const text = parts.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  for (const kind of KINDS)
    for (const box of all(`input[name="${kind}"]`, FORM)) box.checked = !parts.getAll(`no-${kind}`).includes(box.value);
  const select = one("#filter-task");
  const wanted = parts.get("task") ?? "all";
  if (select) select.value = [...select.options].some((option) => option.value === wanted) ? wanted : "all";
}

const tell = () => listeners.forEach((listener) => listener());

function watchFilters() {
  if (!FORM) return;
  recall();
  FORM.addEventListener("submit", (event) => event.preventDefault());
  FORM.addEventListener("change", () => { remember(); tell(); });
  one("#filters-reset").addEventListener("click", () => {
    FORM.reset();
    remember();
    tell();
  });
  addEventListener("hashchange", () => { recall(); tell(); });
}

// A search: every recipe that was measured, the front, the course, and the result's budgets by layer.

const studies = () => DATA.studies ?? [];
const mebi = (count) => count / 2 ** 20;
const whole = (count) => ({ dtick: Math.max(1, Math.ceil(count / 12)) });

function studyFront(study) {
  const points = study.points.filter((point) => point.quality !== null && point.bytes !== null);
  const front = points.filter((point) => point.front).sort((a, b) => a.bytes - b.bytes);
  const best = points.filter((point) => point.best);
  const sizes = points.map((point) => point.bytes);
  const most = sizes.length ? Math.max(...sizes) : 1;
  const traces = [];
  if (front.length) traces.push({ type: "scatter", mode: "lines", hoverinfo: "skip", x: [...front.map((p) => p.bytes), most].map(mebi),
    y: [...front.map((p) => 100 * p.quality), 100 * front.at(-1).quality],
    line: { width: 2, shape: "hv", color: theme("soft") } });
  traces.push(studyMarks(study, points.filter((point) => !point.best), { size: 9, symbol: "circle", color: theme("hue-0") }));
  traces.push(studyMarks(study, best, { size: 16, symbol: "star", color: theme("ink") }));
  return { traces, layout: { height: 400, paperHeight: 320,
    xaxis: axis("MiB held, mean over prompts"), yaxis: axis(`${study.judges}, %`) } };
}

function studyMarks(study, points, marker) {
  return { type: "scatter", mode: "markers", x: points.map((p) => mebi(p.bytes)), y: points.map((p) => 100 * p.quality),
    marker: { ...marker, line: { width: 1, color: theme("raised") } }, cliponaxis: false,
    hovertemplate: `<b>trial %{customdata[0]}</b><br>${study.judges} %{y:.1f}%<br>%{customdata[1]} held<extra></extra>`,
    customdata: points.map((p) => [p.trial, bytes(p.bytes)]) };
}

function studyCourse(study) {
  const points = study.points.filter((point) => point.quality !== null);
  let top = -Infinity;
  const best = points.map((point) => (top = Math.max(top, 100 * point.quality)));
  return { traces: [
    { type: "scatter", mode: "lines", hoverinfo: "skip", x: points.map((p) => p.trial), y: best,
      line: { width: 2, shape: "hv", color: theme("soft") } },
    { ...studyMarks(study, points, { size: 8, symbol: "circle", color: theme("hue-0") }), x: points.map((p) => p.trial) },
  ], layout: { height: 280, paperHeight: 240, xaxis: axis("trial", whole(points.length)), yaxis: axis(`${study.judges}, %`) } };
}

function studyLayers(study) {
  return { traces: [{ type: "bar", x: study.budgets.map((_, layer) => layer), y: study.budgets,
    marker: { color: theme("hue-0") }, hovertemplate: "layer %{x}: %{y} entries a head<extra></extra>" }],
  layout: { height: 240, paperHeight: 220, xaxis: axis("layer", whole(study.budgets.length)), yaxis: axis("entries a head") } };
}

function showStudies() {
  studies().forEach((study, place) => {
    figure(`study-${place}-front`, () => studyFront(study));
    figure(`study-${place}-course`, () => studyCourse(study));
    if (study.budgets.length) figure(`study-${place}-layers`, () => studyLayers(study));
  });
}

// Heat maps: a plot, a sentence and a table of the same numbers.

/**
 * What a heat map shows.
 * map: {x, y, z, xTitle, yTitle, unit, low, high, text, hover, height}; z[row][column], null where there is nothing.
 */
function heatMap(map) {
  return (narrow) => ({
    traces: [{
      type: "heatmap", x: map.x, y: map.y, z: map.z, zmin: map.low, zmax: map.high, colorscale: scale(),
      xgap: map.gap ?? (narrow && map.x.length > 20 ? 0 : 1), ygap: map.gap ?? 1, hoverongaps: false, hovertemplate: map.hover, customdata: map.more,
      text: map.text, texttemplate: map.text ? "%{text}" : undefined,
      colorbar: { title: { text: map.unit, side: narrow ? "top" : "right" }, thickness: 10, outlinewidth: 0, len: 1,
        ...(narrow ? { orientation: "h", y: 1, yanchor: "bottom", ypad: 6 } : {}) },
    }],
    layout: {
      height: map.height + (narrow ? 42 : 0),
      margin: { l: 40, r: narrow ? 14 : 8, t: narrow ? 54 : 12, b: 48 },
      font: { size: narrow ? 11 : 13 },
      xaxis: axis(map.xTitle, { type: map.xType ?? "category", showgrid: false, ...(map.xMore ?? {}) }),
      yaxis: axis(map.yTitle, { type: "category", autorange: "reversed", showgrid: false, ...(map.yMore ?? {}) }),
    },
  });
}

// What a page cannot do without a script: plots, looking for news, and "/" for the search field. Everything else is HTML and htmx.
"use strict";

const NEWS_MS = 500;

function drawPlots(root) {
  if (!window.uPlot) return;
  for (const place of root.querySelectorAll("[data-plot]:not([data-drawn])")) {
    place.dataset.drawn = "yes";
    const told = JSON.parse(place.dataset.plot);
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--quiet").trim(), line = style.getPropertyValue("--line").trim();
    const colours = ["--accent", "--warn", "--good", "--bad"].map(name => style.getPropertyValue(name).trim());
    const axis = {stroke: ink, grid: {stroke: line, width: 1}, ticks: {stroke: line, width: 1}};
    const series = told.series.map((each, k) => ({
      label: each.label, stroke: colours[each.colour ?? k % 4], width: 2, points: {show: each.points === true},
      fill: each.bars ? colours[k % 4] + "55" : undefined,
      paths: each.bars ? uPlot.paths.bars({size: [0.75, 40]}) : undefined, dash: each.dash,
    }));
    const plot = new uPlot({
      width: Math.max(place.clientWidth, 200), height: told.height || 190,
      scales: {x: {time: told.time === true, range: told.xrange ? () => told.xrange : undefined}, y: {range: told.yrange ? () => told.yrange : (u, low, high) => [Math.min(0, low), high || 1]}},
      axes: [{...axis, incrs: told.whole ? [1, 2, 5, 10, 20, 50, 100] : undefined, label: told.xlabel, labelSize: told.xlabel ? 18 : 0}, {...axis, label: told.ylabel, labelSize: told.ylabel ? 18 : 0, size: 56}],
      series: [{label: told.x_name || ""}, ...series], legend: {show: series.length > 1}, cursor: {drag: {x: false, y: false}},
    }, [told.x, ...told.series.map(each => each.y)], place);
    new ResizeObserver(() => plot.setSize({width: Math.max(place.clientWidth, 200), height: told.height || 190})).observe(place);
  }
}

// an element with data-news asks now and then, as long as somebody looks; 204 changes nothing
setInterval(() => {
  if (document.hidden) return;
  for (const place of document.querySelectorAll("[data-news]:not(.htmx-request)")) htmx.trigger(place, "news");
}, NEWS_MS);

document.addEventListener("DOMContentLoaded", () => drawPlots(document));
document.addEventListener("htmx:afterSettle", event => drawPlots(event.target.parentElement || document));
document.addEventListener("keydown", event => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    const field = document.getElementById("search");
    if (field) { event.preventDefault(); field.focus(); }
  }
});

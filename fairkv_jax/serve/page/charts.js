"use strict";
// Draws charts as SVG. Charts are redrawn completely, because they have only a few hundred points.

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });

function make(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const sum = values => values.reduce((total, value) => total + value, 0);
const mean = values => sum(values) / values.length;

/** Rounds up to the next of 1, 2, 4, 6, 10, 20, and so on. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 10].map(step => step * power).find(step => step >= value * 0.999999);
}

/** Returns a function from values to shades: the smallest value is light and the largest dark. */
function shader(values) {
  const least = Math.min(...values), most = Math.max(...values);
  return value => (most > least ? 0.12 + 0.88 * (value - least) / (most - least) : 0.4);
}

/** Moving averages over the last `count` values, because rates vary from second to second. */
function smooth(values, count) {
  return values.map((_, i) => mean(values.slice(Math.max(0, i - count + 1), i + 1)));
}

/**
 * Draws lines over the last `seconds`; null values are gaps.
 * series: [{name: class, area: bool, values: [number | null]}], with a value for each of `times`.
 * least: the minimum of the scale's upper end; fixed: whether it is also the maximum.
 */
function lineChart(svg, times, series, { seconds, least = 1, fixed = false, format = number.format }) {
  const width = svg.clientWidth, height = svg.clientHeight;
  if (!width) return;
  const left = 40, right = 6, top = 8, bottom = 18;
  const largest = Math.max(least, ...series.flatMap(line => line.values.filter(v => v !== null)));
  const most = fixed ? least : roundUp(largest);
  const now = times.at(-1) ?? Date.now() / 1000;
  const x = time => left + (width - left - right) * (1 - (now - time) / seconds);
  const y = value => top + (height - top - bottom) * (1 - Math.min(value / most, 1));
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    const at = y(most * part);
    parts.push(make("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
    parts.push(make("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, format(most * part)));
  }
  for (let ago = 0; ago <= seconds; ago += width < 420 ? 120 : 60) {
    const text = ago ? `−${ago / 60} min` : "now";
    const anchor = ago ? (ago === seconds ? "start" : "middle") : "end";
    parts.push(make("text", { x: x(now - ago), y: height - 3, "text-anchor": anchor }, text));
  }
  for (const line of series) {
    for (const run of runs(times, line.values)) {
      const points = run.map(([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`);
      if (line.area) {
        const ends = [run.at(-1)[0], run[0][0]].map(time => `${x(time).toFixed(1)},${y(0)}`);
        parts.push(make("polygon", { class: `area ${line.name}`, points: [...points, ...ends].join(" ") }));
      }
      parts.push(make("polyline", { class: `line ${line.name}`, points: points.join(" ") }));
    }
  }
  const chosen = pointed(svg, times, x);
  if (svg.dataset.x !== undefined && chosen >= 0) {
    const at = x(times[chosen]);
    parts.push(make("line", { class: "cursor", x1: at, x2: at, y1: top, y2: height - bottom }));
    for (const line of series) {
      const value = line.values[chosen];
      if (value !== null) parts.push(make("circle", { class: `dot ${line.name}`, cx: at, cy: y(value), r: 3 }));
    }
  }
  svg.replaceChildren(...parts);
  const shown = chosen < 0 ? [] : series.map(line => line.values[chosen]);
  const figures = shown.map(value => (value === null ? "–" : format(value))).join(" · ");
  svg.closest("figure").querySelector("output").textContent = figures;
}

/** Runs of values without null, as [time, value] pairs. */
function runs(times, values) {
  const found = [[]];
  values.forEach((value, i) => {
    if (value !== null) found.at(-1).push([times[i], value]);
    else if (found.at(-1).length) found.push([]);
  });
  return found.filter(run => run.length);
}

/** The index of the sample under the pointer, or of the last one. */
function pointed(svg, times, x) {
  if (svg.dataset.x === undefined) return times.length - 1;
  const distances = times.map(time => Math.abs(x(time) - svg.dataset.x));
  return distances.indexOf(Math.min(...distances));
}

/** Calls `redraw` when the pointer moves over a chart; its position is stored in the dataset. */
function followPointer(svg, redraw) {
  svg.addEventListener("pointermove", event => {
    svg.dataset.x = event.clientX - svg.getBoundingClientRect().left;
    redraw();
  });
  svg.addEventListener("pointerleave", () => {
    delete svg.dataset.x;
    redraw();
  });
}

/**
 * Draws a row of cells per layer; cells: [[{shade: 0 to 1, hint, text, framed}]].
 * axis: the name of the columns.
 */
function heatMap(svg, cells, axis) {
  const columns = cells[0].length, margin = 34, header = 18, cellHeight = 15;
  const room = (svg.parentElement.clientWidth - margin - 2) / columns;
  const widest = Math.max(...cells.flat().map(cell => cell.text.length));
  const width = Math.max(Math.min(room, 120), 16, 6.2 * widest + 8);
  const parts = [make("text", { x: 0, y: 12 }, "layer")];
  const every = columns <= 16 ? 1 : 4;
  for (let column = 0; column < columns; column += every) {
    const x = margin + column * width + width / 2;
    parts.push(make("text", { x, y: 12, "text-anchor": "middle" }, `${column}`));
  }
  cells.forEach((row, layer) => {
    const y = header + layer * cellHeight;
    if (layer % 5 === 0 || layer === cells.length - 1) {
      parts.push(make("text", { x: 26, y: y + 11, "text-anchor": "end" }, `${layer}`));
    }
    row.forEach((cell, column) => {
      const x = margin + column * width;
      const box = { x, y, width: width - 1.5, height: cellHeight - 1.5, rx: 2 };
      const group = make("g", {}, make("title", {}, `layer ${layer}, ${axis} ${column}: ${cell.hint}`));
      group.append(make("rect", { class: "cell", ...box }));
      group.append(make("rect", { class: "heat", opacity: cell.shade.toFixed(3), ...box }));
      if (cell.framed) group.append(make("rect", { class: "mark", ...box }));
      const tone = cell.shade > 0.45 ? "light" : "dark";
      const attributes = { class: tone, x: x + (width - 1.5) / 2, y: y + 11, "text-anchor": "middle" };
      if (cell.text) group.append(make("text", attributes, cell.text));
      parts.push(group);
    });
  });
  const size = { width: margin + columns * width + 2, height: header + cells.length * cellHeight + 2 };
  for (const [key, value] of Object.entries(size)) svg.setAttribute(key, value);
  svg.replaceChildren(...parts);
}

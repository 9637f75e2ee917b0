"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const hidden = new Set();
  let chosen = "auto";

  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const figures = all("script[data-plot]").map((script) => [script.dataset.plot, script.textContent]);

  // A figure with the theme's colors in place of their names.
  function colored(text, style) {
    const value = (_, name) => JSON.stringify(style.getPropertyValue(name).trim());
    return JSON.parse(text.replace(/"var\((--[\w-]+)\)"/g, value));
  }

  function draw() {
    root.dataset.theme = chosen === "auto" ? (system.matches ? "dark" : "light") : chosen;
    if (typeof Plotly === "undefined") return;
    const style = getComputedStyle(root);
    const tokens = one("#axis") !== null && one("#axis").value === "tokens";
    const smooth = one("#smooth") !== null && one("#smooth").checked;
    for (const [key, text] of figures) {
      const { data, layout } = colored(text, style);
      let curves = 0;
      for (const trace of data) {
        const meta = trace.meta || {};
        trace.visible = !hidden.has(meta.run) && !(meta.smooth === true && !smooth);
        if (meta.smooth === false && smooth) {
          trace.opacity = 0.28;
          trace.line.width = 1.2;
        }
        if (tokens && meta.tokens) {
          trace.x = meta.tokens;
          layout.xaxis.title.text = "tokens";
        }
        curves += trace.visible ? 1 : 0;
      }
      if (tokens) { // marks stand at steps
        layout.shapes = [];
        layout.annotations = [];
      }
      if (key === "loss" && one("#log").checked) layout.yaxis.type = "log";
      if (data.some((trace) => trace.type === "heatmap")) document.getElementById(key).closest("figure").hidden = curves === 0;
      if (data.every((trace) => trace.type === "scatter")) fit(data, layout);
      layout.dragmode = touch ? false : "zoom";
      label(data, layout, key);
      Plotly.react(key, data, layout, { displayModeBar: false, responsive: true });
    }
  }

  // The x axis from the first point to the last, with room for a marker.
  function fit(data, layout) {
    const xs = data.filter((trace) => trace.visible).flatMap((trace) => trace.x).filter((x) => x !== null);
    if (xs.length === 0) return;
    const first = xs.reduce((a, b) => Math.min(a, b)), last = xs.reduce((a, b) => Math.max(a, b));
    const room = 0.012 * (last - first) || 0.5;
    layout.xaxis.range = [first - room, last + room];
    if (last - first <= 10) Object.assign(layout.xaxis, { tick0: 0, dtick: 1 }); // steps are whole numbers
  }

  // Names at the ends of the curves, where there are few enough to be told apart.
  function label(data, layout, key) {
    const shown = data.filter((trace) => trace.visible && trace.type === "scatter" && (trace.meta || {}).smooth !== true);
    if (key !== "loss" || shown.length > 2) return;
    layout.annotations = layout.annotations || [];
    const ends = shown.map((trace) => {
      let last = trace.y.length - 1;
      while (last > 0 && trace.y[last] === null) last -= 1;
      return { trace, x: trace.x[last], y: trace.y[last] };
    }).filter((end) => end.y !== null && end.y !== undefined);
    const log = layout.yaxis.type === "log";
    const scale = (value) => (log ? Math.log10(value) : value);
    const values = ends.flatMap((end) => end.trace.y).filter((value) => value !== null).map(scale);
    const span = values.reduce((a, b) => Math.max(a, b), -Infinity) - values.reduce((a, b) => Math.min(a, b), Infinity) || 1;
    const reach = layout.xaxis.range[1] - layout.xaxis.range[0];
    const beside = ends.length === 2 && Math.abs(ends[0].x - ends[1].x) < 0.15 * reach;
    const near = beside && Math.abs(scale(ends[0].y) - scale(ends[1].y)) < 0.09 * span;
    const order = ends.length === 2 && ends[0].y < ends[1].y ? 1 : -1;
    ends.forEach((end, index) => layout.annotations.push({
      x: end.x, y: scale(end.y), text: `<b>${end.trace.name.split(", ").pop()}</b> ${Number(end.y).toFixed(3)}`,
      showarrow: false, xanchor: "left", xshift: 8, yshift: near ? 8 * order * (index === 0 ? -1 : 1) : 0,
      font: { color: end.trace.line.color, size: 12 },
    }));
    layout.margin.r = 92;
  }

  for (const button of all("[data-theme]").filter((found) => found.tagName === "BUTTON")) {
    button.addEventListener("click", () => {
      chosen = button.dataset.theme;
      for (const other of all(".themes button")) other.setAttribute("aria-pressed", String(other === button));
      draw();
    });
  }
  for (const button of all(".run")) {
    button.addEventListener("click", () => {
      const number = Number(button.dataset.run);
      if (!hidden.delete(number)) hidden.add(number);
      button.setAttribute("aria-pressed", String(!hidden.has(number)));
      for (const part of all(`[data-of="${number}"]`)) part.hidden = hidden.has(number);
      draw();
    });
  }
  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("pre").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch { // a page that is opened from a disk may have no clipboard: the text is selected instead
        getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  for (const control of all("#axis, #log, #smooth")) control.addEventListener("change", draw);
  system.addEventListener("change", () => { if (chosen === "auto") draw(); });
  if (one("#smooth") && !figures.some(([, text]) => /"smooth": ?true/.test(text))) one("#smooth").parentElement.hidden = true;
  draw();
})();

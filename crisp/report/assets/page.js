"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
  const COLOURS = 8;
  const HEIGHT = 240;
  const MARGIN = { left: 58, right: 12, top: 10, bottom: 34 };
  const FEW = 30; // points that are marked one by one

  const make = (name, attributes, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const html = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // ------------------------------------------------------------------------------------------------ numbers and scales
  const grouped = (value) => value.toLocaleString("en", { maximumFractionDigits: 6 });
  const plain = (value, digits) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
      return value.toExponential(Math.max(0, digits - 1)).replace(/\.?0*e\+?/, "e");
    }
    return String(Number(value.toPrecision(digits)));
  };
  const shown = (value, percent, digits) => (percent ? plain(100 * value, digits) + "%" : plain(value, digits));

  const niceTicks = (low, high, wanted) => {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * (1 - 1e-9));
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  };
  const powers = (low, high) => {
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) ticks.push(10 ** p);
    const every = Math.ceil(ticks.length / 6);
    return ticks.filter((t, i) => i % every === 0 && t >= low * 0.999 && t <= high * 1.001);
  };
  const bounds = (values) => {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v !== null) { if (v < low) low = v; if (v > high) high = v; }
    return [low, high];
  };
  const scaleOf = (low, high, from, to, log) => {
    const f = log ? Math.log10 : (v) => v;
    const a = f(low), b = f(high);
    return (v) => from + ((f(v) - a) / (b - a)) * (to - from);
  };
  const padded = ([low, high], log) => {
    if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
    const room = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  };

  // --------------------------------------------------------------------------------------------------------- a chart
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  };

  const pathOf = (series, sx, sy, usable) => {
    let path = "", pen = "M";
    for (let i = 0; i < series.x.length; i++) {
      if (!usable(series.y[i])) { pen = "M"; continue; }
      path += pen + sx(series.x[i]).toFixed(1) + " " + sy(series.y[i]).toFixed(1);
      pen = "L";
    }
    return path;
  };

  const chart = (figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const all = data.series.flatMap((s) => s.y).filter((v) => v !== null);
    const log = data.log && Math.min(...bounds(all)) > 0;
    const usable = (v) => v !== null && (!log || v > 0);
    const xs = [...new Set(data.series.flatMap((s) => s.x))].sort((a, b) => a - b);
    const plot = html("div", "plot");
    plot.tabIndex = 0;
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${data.title}: ` + data.series.filter((s) => !s.faint).map((s) => {
      const known = s.y.filter((v) => v !== null);
      return `${s.label} from ${shown(known[0], data.percent, 4)} to ${shown(known[known.length - 1], data.percent, 4)}`;
    }).join("; ") + ". Arrow keys read values.");
    const named = data.series.filter((s) => !s.faint);
    if (named.length > 1 || data.note) {
      const legend = html("ul", "legend");
      for (const s of named.length > 1 ? named : []) {
        const item = html("li");
        item.append(swatch(s), html("span", "", s.label));
        legend.append(item);
      }
      if (data.note) legend.append(html("li", "", data.note));
      figure.append(legend);
    }
    const tip = html("div", "tip");
    tip.setAttribute("role", "status");
    tip.hidden = true;
    figure.append(plot, tip);
    let view = null; // what is drawn now
    let at = null; // place in xs that is read

    const draw = () => {
      const width = Math.max(240, Math.round(plot.clientWidth));
      if (view && view.width === width) return;
      const [x0, x1] = xs.length > 1 ? [xs[0], xs[xs.length - 1]] : [xs[0] - 1, xs[0] + 1];
      const [y0, y1] = padded(bounds(all), log);
      const sx = scaleOf(x0, x1, MARGIN.left, width - MARGIN.right, false);
      const sy = scaleOf(y0, y1, HEIGHT - MARGIN.bottom, MARGIN.top, log);
      const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
      for (const t of log ? powers(y0, y1) : niceTicks(y0, y1, 4)) {
        const y = sy(t);
        svg.append(make("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
        svg.append(make("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, shown(t, data.percent, 4)));
      }
      for (const t of niceTicks(x0, x1, width < 420 ? 4 : 6)) {
        if (!Number.isInteger(t)) continue;
        const x = sx(t);
        svg.append(make("line", { class: "grid", x1: x, x2: x, y1: HEIGHT - MARGIN.bottom, y2: HEIGHT - MARGIN.bottom + 4 }));
        svg.append(make("text", { x, y: HEIGHT - MARGIN.bottom + 17, "text-anchor": "middle" }, grouped(t)));
      }
      svg.append(make("text", { x: width - MARGIN.right, y: HEIGHT - 4, "text-anchor": "end" }, data.x));
      const ordered = [...data.series].sort((a, b) => b.faint - a.faint);
      for (const s of ordered) {
        const group = make("g", { class: `run${s.run % COLOURS}` });
        group.append(make("path", {
          class: s.faint ? "line faint" : "line", d: pathOf(s, sx, sy, usable), "stroke-dasharray": dashOf(s),
        }));
        if (!s.faint && s.x.length <= FEW) {
          s.x.forEach((x, i) => {
            if (usable(s.y[i])) group.append(make("circle", { class: "dot", cx: sx(x), cy: sy(s.y[i]), r: 3 }));
          });
        }
        svg.append(group);
      }
      const cursor = make("g", { visibility: "hidden" });
      svg.append(cursor);
      plot.replaceChildren(svg);
      view = { width, sx, sy, svg, cursor, x0, x1 };
      if (at !== null) read(at);
    };

    const read = (place) => {
      at = Math.max(0, Math.min(xs.length - 1, place));
      const x = xs[at];
      const { sx, sy, cursor, width } = view;
      cursor.replaceChildren(make("line", { class: "cursor", x1: sx(x), x2: sx(x), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(html("strong", "", `${data.x} ${grouped(x)}`));
      for (const s of data.series) {
        const i = nearest(s.x, x);
        const line = html("div");
        // A thinned or sparser curve has its nearest point elsewhere: say where.
        const where = s.x[i] === x ? "" : ` (at ${grouped(s.x[i])})`;
        const value = s.y[i] === null ? "not finite" : shown(s.y[i], data.percent, 5);
        line.append(swatch(s), html("span", "", s.label + where), html("b", "", value));
        tip.append(line);
        if (usable(s.y[i])) {
          const group = make("g", { class: `run${s.run % COLOURS}` });
          group.append(make("circle", { class: "dot", cx: sx(s.x[i]), cy: sy(s.y[i]), r: 4 }));
          cursor.append(group);
        }
      }
      tip.hidden = false;
      const share = plot.clientWidth / width;
      const left = plot.offsetLeft + sx(x) * share;
      const room = figure.clientWidth - tip.offsetWidth;
      const wanted = left > figure.clientWidth / 2 ? left - tip.offsetWidth - 12 : left + 12;
      tip.style.left = `${Math.max(0, Math.min(room, wanted))}px`;
      // Below a narrow chart, which it would hide.
      tip.style.top = `${plot.offsetTop + (width < 420 ? plot.offsetHeight : MARGIN.top)}px`;
    };
    const hide = () => {
      at = null;
      tip.hidden = true;
      if (view) view.cursor.setAttribute("visibility", "hidden");
    };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const px = ((event.clientX - box.left) / box.width) * view.width;
      const share = (px - MARGIN.left) / (view.width - MARGIN.left - MARGIN.right);
      read(nearest(xs, view.x0 + share * (view.x1 - view.x0)));
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.round(xs.length / 10));
      const now = at === null ? xs.length : at;
      const target = {
        ArrowLeft: now - 1, ArrowRight: at === null ? 0 : now + 1, PageDown: now - page, PageUp: now + page,
        Home: 0, End: xs.length - 1,
      }[event.key];
      if (event.key === "Escape") hide();
      if (target === undefined) return;
      event.preventDefault();
      read(target);
    });
    new ResizeObserver(draw).observe(plot);
    draw();
  };

  const dashOf = (s) => (s.faint ? "" : DASHES[s.dash % DASHES.length]);
  const swatch = (s) => {
    const line = make("svg", { class: `run${s.run % COLOURS}`, width: 24, height: 8, "aria-hidden": "true" });
    line.style.flex = "none";
    line.append(make("path", { class: s.faint ? "line faint" : "line", d: "M0 4L24 4", "stroke-dasharray": dashOf(s) }));
    return line;
  };

  // -------------------------------------------------------------------------------------------------------- pictures
  const slider = (box) => {
    const moments = JSON.parse(box.querySelector("script").textContent);
    const [range, actual] = box.querySelectorAll("input");
    const output = box.querySelector("output");
    const show = () => {
      const [step, name] = moments[Number(range.value)];
      output.textContent = name;
      range.setAttribute("aria-valuetext", name);
      for (const strip of box.querySelectorAll(".strip")) {
        const pictures = [...strip.querySelectorAll("figure")];
        const past = pictures.filter((p) => Number(p.dataset.step) <= step);
        const chosen = past.length ? past[past.length - 1] : pictures[0];
        for (const picture of pictures) picture.hidden = picture !== chosen;
      }
    };
    range.addEventListener("input", show);
    actual.addEventListener("change", () => box.classList.toggle("actual", actual.checked));
    show();
  };

  document.querySelectorAll("figure.chart").forEach(chart);
  document.querySelectorAll(".slider").forEach(slider);
})();

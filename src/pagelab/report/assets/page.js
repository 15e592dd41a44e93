"use strict";
// Draws the charts, fills the data tables, and keeps the page's settings in its address.
const PageLab = (() => {
  const root = document.documentElement;
  const errors = [];
  const note = (error) => {
    errors.push(String((error && error.message) || error));
    root.dataset.errors = JSON.stringify(errors);
  };
  root.dataset.errors = "[]";
  window.addEventListener("error", (event) => note(event.error || event.message));
  window.addEventListener("unhandledrejection", (event) => note(event.reason));

  const page = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);

  // -- the address: #step=120&theme=dark works as a link; #pool still goes to the section

  const settings = () =>
    new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");

  function remember(changes) {
    const now = settings();
    for (const [name, value] of Object.entries(changes)) now.set(name, value);
    try {
      history.replaceState(null, "", "#" + now);
    } catch {
      // A page inside another one (a notebook's output, say) has no address of its own.
    }
  }

  // -- light and dark: colours are CSS variables, so nothing has to be drawn again but canvases

  const dark = () =>
    root.style.colorScheme === "dark" ||
    (root.style.colorScheme === "" && matchMedia("(prefers-color-scheme: dark)").matches);

  const themeListeners = [];
  function themeChanged() {
    byId("theme").textContent = dark() ? "Light" : "Dark";
    root.dataset.theme = dark() ? "dark" : "light";
    themeListeners.forEach((listener) => listener());
  }
  function setTheme(theme) {
    root.style.colorScheme = theme === "dark" || theme === "light" ? theme : "";
    themeChanged();
  }
  byId("theme").addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    setTheme(theme);
    remember({ theme });
  });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", themeChanged); // paper is always light
  }

  // -- charts

  const views = new Map(); // chart id → Vega view

  function rowsOf(columns) {
    const names = Object.keys(columns);
    return columns[names[0]].map((_, i) =>
      Object.fromEntries(names.map((name) => [name, columns[name][i]])));
  }

  async function draw() {
    let drawn = 0;
    const tables = {};
    const count = () => { root.dataset.charts = `${drawn}/${page.charts.length}`; };
    count();
    let since = performance.now();
    for (const chart of page.charts) {
      if (performance.now() - since > 60) { // let the page scroll and answer between charts
        await new Promise((resume) => setTimeout(resume));
        since = performance.now();
      }
      const spec = { ...chart.spec, datasets: {} };
      for (const name of chart.uses) {
        spec.datasets[name] = tables[name] ||= rowsOf(page.data[name]);
      }
      const element = byId(chart.id);
      const options = { renderer: "svg", actions: false, tooltip: false, config: page.config };
      try {
        // The element's own role and label stay: they say what the chart shows.
        const { role, ariaLabel } = element;
        const { view } = await vegaEmbed(element, spec, options);
        Object.assign(element, { role, ariaLabel });
        element.style.minHeight = "";
        views.set(chart.id, view);
        if (chart.hover) hoverable(element, chart, view);
        drawn += 1;
      } catch (error) {
        note(`${chart.id}: ${error.message}`);
        element.textContent = "This chart could not be drawn.";
      }
      count();
    }
  }

  // -- figures at the pointer

  const tip = byId("tip");
  const figure = (value) =>
    Number(value).toLocaleString("en", { maximumSignificantDigits: value < 100 ? 3 : 6 });

  // The entry that a step chart shows at x: "before" draws each value back to the one before.
  function entryAt(xs, x, mode) {
    let low = 0, high = xs.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (mode === "before" ? xs[middle] < x : xs[middle] <= x) low = middle + 1;
      else high = middle;
    }
    return mode === "before" ? low : low - 1;
  }

  function line(name, value) {
    const row = document.createElement("div");
    const label = row.appendChild(document.createElement("span"));
    label.textContent = name;
    row.appendChild(document.createElement("b")).textContent = value;
    return row;
  }

  // The rows of a tip at x: what it is called there, and each series' figure.
  function figuresAt({ mode, unit, rows, xs, names }, x) {
    const nearest = mode === "nearest" ? xs.indexOf(x) : -1;
    const found = [line(nearest < 0 ? `${figure(Math.max(x, 0))} s` : names[nearest], unit)];
    for (const [name, field, label] of rows) {
      const columns = page.data[name];
      const at = columns.t || columns.x;
      const i = mode === "nearest" ? at.indexOf(x) : entryAt(at, x, mode);
      const value = columns[field][i];
      let text = value === undefined ? (i < 0 ? "0" : "done") : figure(value);
      if (unit === "share") text = `${Math.round((value || 0) * 1000) / 10} %`;
      if (mode === "nearest" && value === undefined) text = "not run";
      found.push(line(label, text));
    }
    return found;
  }

  function hoverable(element, chart, view) {
    const cross = element.appendChild(document.createElement("div"));
    cross.className = "cross";
    cross.hidden = true;
    const { xs } = chart.hover;
    const place = (x) => view.scale("x")(x);
    const closest = (at) => xs.reduce((a, b) => (Math.abs(place(b) - at) < Math.abs(place(a) - at) ? b : a));
    let position = null; // pixels from the left of the plot
    const leave = () => { cross.hidden = tip.hidden = true; position = null; };

    function show(at, clientX, clientY) {
      const [left, top] = view.origin();
      if (at < 0 || at > view.width()) return leave();
      const x = xs ? closest(at) : view.scale("x").invert(at);
      position = xs ? place(x) : at;
      tip.replaceChildren(...figuresAt(chart.hover, x));
      cross.hidden = tip.hidden = false;
      cross.style.cssText = `left:${left + position}px;top:${top}px;height:${view.height()}px`;
      const right = clientX + 16 + tip.offsetWidth > innerWidth;
      const below = clientY + 16 + tip.offsetHeight > innerHeight;
      tip.style.left = `${right ? Math.max(4, clientX - tip.offsetWidth - 12) : clientX + 16}px`;
      tip.style.top = `${below ? Math.max(4, clientY - tip.offsetHeight - 12) : clientY + 16}px`;
      return undefined;
    }

    for (const name of ["pointerleave", "pointercancel", "blur"]) element.addEventListener(name, leave);
    element.addEventListener("pointermove", (event) => {
      show(event.clientX - element.getBoundingClientRect().left - view.origin()[0],
        event.clientX, event.clientY);
    });
    element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return leave();
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return undefined;
      event.preventDefault();
      const width = view.width();
      let at;
      if (xs) {
        const i = position === null ? (step > 0 ? -1 : xs.length) : xs.indexOf(closest(position));
        at = place(xs[Math.max(0, Math.min(i + step, xs.length - 1))]);
      } else {
        at = Math.max(0, Math.min((position ?? (step > 0 ? 0 : width)) + step * width / 60, width));
      }
      const box = element.getBoundingClientRect();
      return show(at, box.left + view.origin()[0] + at, box.top + 12);
    });
  }

  // -- time scale of the pool strips

  function setScale(own) {
    const button = byId("scale");
    if (!button) return;
    button.setAttribute("aria-pressed", String(own));
    for (const chart of page.charts) {
      const view = views.get(chart.id);
      if (view && chart.hover && chart.hover.own) {
        view.signal("end", own ? chart.hover.own : chart.hover.same).runAsync();
      }
    }
  }
  byId("scale")?.addEventListener("click", (event) => {
    const own = event.currentTarget.getAttribute("aria-pressed") !== "true";
    setScale(own);
    remember({ time: own ? "own" : "same" });
  });

  // -- data tables, made when they are opened: most never are

  const HEADS = { t: "time, s", x: "seconds", share: "share at or below", rounding: "of external: rounded up", rss: "RSS, MiB", device: "device, MiB" };
  document.addEventListener("toggle", (event) => {
    const details = event.target;
    const columns = page.data[details.dataset?.table];
    const box = details.querySelector?.(":scope > .scroll");
    if (!columns || !box || !details.open || box.firstChild) return;
    const table = document.createElement("table");
    const names = Object.keys(columns);
    const add = (row, tag, text) => {
      const cell = row.appendChild(document.createElement(tag));
      cell.className = "n";
      cell.textContent = text;
      return cell;
    };
    const head = table.createTHead().insertRow();
    names.forEach((name) => { add(head, "th", HEADS[name] || name).scope = "col"; });
    const body = table.createTBody();
    columns[names[0]].forEach((_, i) => {
      const row = body.insertRow();
      names.forEach((name) => add(row, "td", columns[name][i]));
    });
    box.append(table);
  }, true);

  // On paper nothing can be opened: small tables are open there, long ones stay away.
  const folded = () => document.querySelectorAll("details.figures:not([open])");
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...folded()];
    opened.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => {
    opened.forEach((details) => { details.open = false; });
  });

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = byId(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source); // no clipboard on file://: select it instead
      }
    });
  }

  const ready = draw().then(() => setScale(settings().get("time") === "own"));
  window.addEventListener("hashchange", () => {
    if (!settings().size) return;
    setTheme(settings().get("theme"));
    setScale(settings().get("time") === "own");
  });
  setTheme(settings().get("theme"));

  return { page, byId, settings, remember, figure, ready, onTheme: (f) => themeListeners.push(f) };
})();

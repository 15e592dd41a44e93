"use strict";
// The live page map: reads /map/events and draws. Every text from the server goes through textContent.
(() => {
  const byId = (id) => document.getElementById(id);
  const FREE = -1, CACHED = -2, HISTORY_S = 300, GOLDEN = 137.508;
  const STATES = [
    ["live", "holds a token's K/V"], ["unwritten", "allocated, still empty"],
    ["cached", "reusable prefix"], ["free", "can be allocated"],
    ["external", "free, in holes too small"],
  ];
  const view = {
    info: null, holder: new Int32Array(0), refs: new Int32Array(0), written: new Int32Array(0),
    rows: new Map(), order: [], history: [], latest: null, mode: "holder", paused: false,
    block: -1, request: null, pinned: false, dirty: true, cell: 0, columns: 1,
  };

  // -- colours

  let css = {};
  function readColours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["live", "unwritten", "cached", "free", "external", "line", "text", "soft",
      "accent", "mark", "light", "saturation", "card"];
    css = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    view.dirty = true;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
  const hue = (number) => `hsl(${(number * GOLDEN) % 360} ${css.saturation} ${css.light})`;

  // -- what the server says

  function take(data) {
    if (data.kind === "all") {
      if (data.info) view.info = data.info;
      const count = view.info ? view.info.num_blocks : 0;
      view.holder = new Int32Array(count).fill(FREE);
      view.refs = new Int32Array(count);
      view.written = new Int32Array(count);
    }
    const blocks = data.blocks;
    for (let i = 0; i < blocks.length; i += 4) {
      view.holder[blocks[i]] = blocks[i + 1];
      view.refs[blocks[i]] = blocks[i + 2];
      view.written[blocks[i]] = blocks[i + 3];
    }
    if (data.requests) {
      const before = new Map(view.order.map((row) => [`${row.id}#${row.sample}`, row.table]));
      view.rows = new Map();
      view.order = data.requests.map((row) => {
        const [number, id, sample, state, prompt, output, most, computed, cached, preempted, age, kept, added] = row;
        const old = kept ? before.get(`${id}#${sample}`) || [] : [];
        const table = old.slice(0, kept).concat(added);
        const found = { number, id, sample, state, prompt, output, most, computed, cached, preempted, age, table };
        if (!view.rows.has(number)) view.rows.set(number, found);
        return found;
      });
      view.unlisted = data.unlisted;
    }
    view.latest = data;
    remember(data);
    view.dirty = true;
  }

  function remember(data) {
    const { stats } = data;
    if (!stats) return;
    const history = view.history, last = history[history.length - 1];
    if (last && stats.total_tokens < last.tokens) history.length = 0; // another engine
    history.push({ t: data.time, tokens: stats.total_tokens, ledger: stats.ledger, running: stats.num_running });
    while (history.length && history[0].t < data.time - HISTORY_S) history.shift();
  }

  function rateAt(index, seconds) {
    const history = view.history, end = history[index];
    let start = index;
    while (start > 0 && history[start].t > end.t - seconds) start -= 1;
    const time = end.t - history[start].t;
    return time > 0 ? (end.tokens - history[start].tokens) / time : 0;
  }

  // -- the pool

  const pool = byId("pool");

  function fit(canvas, height) {
    const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
    const w = Math.round(width * scale), h = Math.round(height * scale);
    if (canvas.width !== w || canvas.height !== h) {
      canvas.width = w;
      canvas.height = h;
      canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    return [context, width];
  }

  function drawPool() {
    const count = view.holder.length, width = pool.clientWidth;
    if (!count || !width) return;
    const height = Math.max(160, Math.min(440, width * 0.55));
    let cell = Math.max(3, Math.min(26, Math.floor(Math.sqrt((width * height) / count))));
    let columns = Math.max(1, Math.floor(width / cell));
    const rows = Math.ceil(count / columns);
    view.cell = cell;
    view.columns = columns;
    const [context] = fit(pool, rows * cell);
    const gap = cell > 5 ? 1 : cell > 3 ? 0.5 : 0, side = cell - gap;
    const size = view.info.block_size;
    const chosen = view.request;
    const mine = chosen !== null && view.rows.has(chosen) ? new Set(tablesOf(chosen)) : null;
    for (let block = 0; block < count; block += 1) {
      const x = (block % columns) * cell, y = Math.floor(block / columns) * cell;
      const holder = view.holder[block];
      context.globalAlpha = mine && !mine.has(block) && holder >= 0 ? 0.2 : 1;
      if (holder === FREE) context.fillStyle = css.free;
      else if (holder === CACHED) context.fillStyle = css.cached;
      else context.fillStyle = view.mode === "state" ? css.unwritten : hue(holder);
      if (holder < 0) {
        context.fillRect(x, y, side, side);
        continue;
      }
      const full = side * (view.written[block] / size);
      if (view.mode === "state") {
        context.fillRect(x, y, side, side);
        context.fillStyle = css.live;
        context.fillRect(x, y + side - full, side, full);
      } else {
        const strong = context.globalAlpha;
        context.globalAlpha = strong * 0.35;
        context.fillRect(x, y, side, side);
        context.globalAlpha = strong;
        context.fillRect(x, y + side - full, side, full);
      }
      if (view.refs[block] > 1 && cell >= 5) { // shared
        const dot = Math.max(2, side * 0.34);
        context.fillStyle = css.mark;
        context.fillRect(x + (side - dot) / 2, y + (side - dot) / 2, dot, dot);
      }
    }
    context.globalAlpha = 1;
    if (view.block >= 0 && view.block < count) {
      context.strokeStyle = css.text;
      context.lineWidth = 2;
      context.strokeRect((view.block % columns) * cell - 0.5, Math.floor(view.block / columns) * cell - 0.5, side + 1, side + 1);
    }
  }

  const tablesOf = (number) => view.order.filter((row) => row.number === number).flatMap((row) => row.table);

  function swatch(colour, text) {
    const item = document.createElement("li"), box = document.createElement("i");
    box.style.background = colour;
    item.append(box, text);
    return item;
  }

  function drawLegend() {
    const items = view.mode === "state"
      ? [swatch(css.live, "live"), swatch(css.unwritten, "allocated, unwritten")]
      : [swatch(hue(0), "one colour a request; pale: not written yet")];
    items.push(swatch(css.cached, "cached"), swatch(css.free, "free"));
    const shared = document.createElement("li");
    shared.textContent = "▪ inside: shared by several sequences";
    byId("legend").replaceChildren(...items, shared);
    byId("ledger-legend").replaceChildren(...STATES.map(([name, means]) => swatch(css[name], `${name}: ${means}`)));
  }

  // -- one block

  let asking = 0;
  function choose(block, pinned = false) {
    if (block === view.block && !pinned) return;
    view.block = block;
    view.dirty = true;
    const said = byId("block"), text = byId("block-text");
    text.textContent = "";
    if (block < 0) {
      view.request = view.pinned ? view.request : null;
      said.textContent = "Point at a block, or choose one with the arrow keys.";
      return;
    }
    describe();
    clearTimeout(asking);
    asking = setTimeout(async () => {
      try {
        const answer = await fetch(`/map/blocks/${block}`, { headers: headers() });
        if (!answer.ok || view.block !== block) return;
        const found = await answer.json();
        const parts = [];
        if (found.hash) parts.push(`hash ${found.hash}`);
        if (found.holders.length > 1) parts.push(`held by ${found.holders.map(([id, s]) => `${id}#${s}`).join(", ")}`);
        if (found.position !== null) parts.push(`tokens ${found.position} to ${found.position + found.written - 1}`);
        if (found.text) parts.push(JSON.stringify(found.text));
        text.textContent = parts.join("\n");
      } catch { /* the stream says when the server is gone */ }
    }, 120);
  }

  function describe() {
    const block = view.block;
    if (block < 0 || block >= view.holder.length) return;
    const holder = view.holder[block], size = view.info.block_size;
    let what = "free";
    if (holder === CACHED) what = "cached: held by nobody, its content is reusable";
    else if (holder >= 0) {
      const row = view.rows.get(holder);
      const who = row ? `${row.id}#${row.sample}, its block ${row.table.indexOf(block) + 1} of ${row.table.length}` : "a request that has just ended";
      what = `${who}; ${view.written[block]} of ${size} slots written, held ${view.refs[block]} time${view.refs[block] === 1 ? "" : "s"}`;
    }
    byId("block").textContent = `Block ${block}: ${what}.`;
  }

  function blockAt(event) {
    const box = pool.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / view.cell);
    const row = Math.floor((event.clientY - box.top) / view.cell);
    const block = row * view.columns + column;
    return column < view.columns && block < view.holder.length ? block : -1;
  }

  pool.addEventListener("pointermove", (event) => choose(blockAt(event)));
  pool.addEventListener("pointerdown", (event) => choose(blockAt(event), true));
  pool.addEventListener("pointerleave", () => choose(-1));
  pool.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -view.columns, ArrowDown: view.columns };
    const last = view.holder.length - 1;
    let next = view.block;
    if (event.key in steps) next = Math.max(0, Math.min(last, Math.max(0, view.block) + steps[event.key]));
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    else if (event.key === "Escape") next = -1;
    else return;
    event.preventDefault();
    choose(next);
  });

  // -- requests

  function cellOf(text, number = true) {
    const cell = document.createElement("td");
    if (number) cell.className = "number";
    cell.textContent = text;
    return cell;
  }

  function rowOf(row) {
    const line = document.createElement("tr"), first = document.createElement("td");
    const box = document.createElement("i"), name = document.createElement("button");
    box.style.background = row.table.length ? hue(row.number) : "transparent";
    name.type = "button";
    name.textContent = `${row.id.slice(0, 18)}#${row.sample}`;
    name.setAttribute("aria-label", `Show the blocks of ${row.id}, sample ${row.sample}`);
    name.dataset.number = row.number;
    first.append(box, name);
    const answer = document.createElement("td"), bar = document.createElement("progress");
    bar.max = row.most;
    bar.value = row.output;
    answer.append(bar, `${row.output} / ${row.most}`);
    if (row.number === view.request) line.className = "chosen";
    line.dataset.number = row.number;
    line.append(first, cellOf(row.state, false), cellOf(row.prompt), cellOf(row.cached), answer,
      cellOf(row.table.length), cellOf(row.preempted), cellOf(`${row.age.toFixed(1)} s`));
    return line;
  }

  const list = byId("requests");
  function drawRequests() {
    const focused = document.activeElement && document.activeElement.dataset.number;
    const shown = view.order.slice(0, 200);
    list.replaceChildren(...shown.map(rowOf));
    const more = view.order.length - shown.length + (view.unlisted || 0);
    byId("unlisted").textContent = more ? `and ${more} more` : shown.length ? "" : "none";
    if (focused !== undefined) {
      const again = list.querySelector(`button[data-number="${focused}"]`);
      if (again) again.focus({ preventScroll: true });
    }
  }
  function highlight(number, pinned) {
    view.request = number;
    view.pinned = pinned;
    view.dirty = true;
  }
  list.addEventListener("pointerover", (event) => {
    const line = event.target.closest("tr");
    if (line && !view.pinned) highlight(Number(line.dataset.number), false);
  });
  list.addEventListener("pointerleave", () => { if (!view.pinned) highlight(null, false); });
  list.addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    if (!line) return;
    const number = Number(line.dataset.number);
    if (view.pinned && view.request === number) highlight(null, false);
    else highlight(number, true);
  });

  // -- figures and charts

  const whole = (value) => Math.round(value).toLocaleString("en");
  const time = (s) => (s < 1 ? `${(s * 1000).toFixed(0)} ms` : `${s.toFixed(2)} s`);
  const share = (part, all) => (all > 0 ? `${((100 * part) / all).toFixed(1)} %` : "–");
  const pair = (values) => (values ? values.map(time).join(" / ") : "–");

  function drawFigures() {
    const { stats, latency } = view.latest;
    if (!stats || !view.info) return;
    const ledger = stats.ledger, slots = view.info.num_blocks * view.info.block_size;
    let held = 0;
    for (const holder of view.holder) held += holder >= 0;
    const entries = [
      ["running / waiting", `${stats.num_running} / ${stats.num_waiting}`],
      ["tokens a second", view.history.length > 1 ? whole(rateAt(view.history.length - 1, 2)) : "–"],
      ["blocks held", share(held, view.info.num_blocks)],
      ["slots live", share(ledger.live, slots)],
      ["slots saved by sharing", whole(ledger.shared_saved)],
      ["TTFT p50 / p95", pair(latency && latency.ttft)],
      ["ITL p50 / p95", pair(latency && latency.itl)],
      ["prefix hits", share(stats.prefix_hit_tokens, stats.prefix_queried_tokens)],
      ["preemptions", whole(stats.num_preemptions)],
      ["last step", time(stats.step_s)],
      ["steps", whole(stats.step + 1)],
      ["engine restarts", whole(view.latest.restarts)],
    ];
    byId("figures").replaceChildren(...entries.flatMap(([name, value]) => {
      const box = document.createElement("div"), term = document.createElement("dt"), data = document.createElement("dd");
      term.textContent = name;
      data.textContent = value;
      box.append(term, data);
      return [box];
    }));
  }

  // A young page shows what there is, not an empty chart of five minutes.
  const spanOf = (history) => Math.max(20, history[history.length - 1].t - history[0].t);

  function drawLedger() {
    const [context, width] = fit(byId("ledger"), 120), history = view.history;
    if (history.length < 2) return;
    const end = history[history.length - 1].t, span = spanOf(history);
    const slots = STATES.reduce((sum, [name]) => sum + history[history.length - 1].ledger[name], 0);
    const x = (t) => width - ((end - t) / span) * width;
    const below = new Float64Array(history.length);
    for (const [name] of STATES) {
      context.fillStyle = css[name];
      context.beginPath();
      for (let i = 0; i < history.length; i += 1) context.lineTo(x(history[i].t), 118 - below[i]);
      for (let i = history.length - 1; i >= 0; i -= 1) {
        below[i] += (116 * history[i].ledger[name]) / slots;
        context.lineTo(x(history[i].t), 118 - below[i]);
      }
      context.fill();
    }
  }

  function drawRate() {
    const [context, width] = fit(byId("rate"), 120), history = view.history;
    if (history.length < 2) return;
    const end = history[history.length - 1].t, step = Math.max(1, Math.floor(history.length / 400));
    const points = [];
    for (let i = 1; i < history.length; i += step) points.push([width - ((end - history[i].t) / spanOf(history)) * width, rateAt(i, 2)]);
    const most = Math.max(1, ...points.map(([, rate]) => rate));
    context.strokeStyle = css.accent;
    context.lineWidth = 1.5;
    context.beginPath();
    for (const [x, rate] of points) context.lineTo(x, 114 - (98 * rate) / most);
    context.stroke();
    context.fillStyle = css.soft;
    context.font = "12px system-ui, sans-serif";
    context.fillText(`${whole(most)} at most`, 2, 12);
  }

  function draw() {
    if (view.dirty && view.latest && !document.hidden) {
      view.dirty = false;
      drawPool();
      drawRequests();
      drawFigures();
      drawLedger();
      drawRate();
      describe();
    }
    requestAnimationFrame(draw);
  }

  function drawState(state) {
    const pill = byId("state");
    if (pill.textContent !== state) pill.textContent = state;
    pill.dataset.state = state;
    if (!view.info) return;
    const { model, dtype, device, num_blocks, block_size, block_bytes, allocator } = view.info;
    const bytes = num_blocks * block_bytes;
    byId("facts").textContent = `${model}, ${dtype} on ${device}; ${num_blocks.toLocaleString("en")} blocks of ${block_size} slots, ${(bytes / 2 ** 20).toFixed(0)} MiB; allocator ${allocator}`;
  }

  // -- the connection

  const headers = () => {
    const key = sessionStorage.getItem("pagelab-key");
    return key ? { Authorization: `Bearer ${key}` } : {};
  };

  async function* events(answer) {
    const reader = answer.body.getReader(), decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  }

  const kept = []; // what came while paused: changes must not be lost
  async function connect() {
    for (;;) {
      try {
        const answer = await fetch("/map/events", { headers: headers() });
        if (answer.status === 401) {
          byId("key-form").hidden = false;
          drawState("needs a key");
          return;
        }
        if (!answer.ok) throw new Error(String(answer.status));
        for await (const text of events(answer)) {
          const data = JSON.parse(text);
          if (view.paused) {
            if (data.kind === "all") kept.length = 0;
            kept.push(data);
          } else take(data);
          drawState(view.paused ? "paused" : data.state);
        }
      } catch { /* tried again below */ }
      drawState("lost");
      await new Promise((done) => setTimeout(done, 1000));
    }
  }

  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("pagelab-key", byId("key").value);
    byId("key-form").hidden = true;
    connect();
  });

  byId("save").addEventListener("click", async () => {
    const answer = await fetch("/map/recording", { headers: headers() });
    const found = await answer.json();
    if (!answer.ok) {
      line(found.error.message, "error");
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(found)], { type: "application/json" }));
    link.download = "pagelab-recording.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  byId("pause").addEventListener("click", () => {
    view.paused = !view.paused;
    byId("pause").setAttribute("aria-pressed", String(view.paused));
    byId("pause").textContent = view.paused ? "Go on" : "Pause";
    if (!view.paused) for (const data of kept.splice(0)) take(data);
  });

  for (const mode of ["holder", "state"]) {
    byId(`by-${mode}`).addEventListener("click", () => {
      view.mode = mode;
      for (const other of ["holder", "state"]) byId(`by-${other}`).setAttribute("aria-pressed", String(other === mode));
      drawLegend();
      view.dirty = true;
    });
  }

  // -- traffic

  const PROMPTS = ["The history of tea begins", "A short story about a lighthouse:", "The planets of the solar system are",
    "To bake bread you need", "Once upon a time in a small village", "The most important inventions of the last century",
    "Dear diary, today", "How a steam engine works:"];
  const talk = byId("talk"), running = new Set(), conversation = [];

  function line(text, kind) {
    const paragraph = document.createElement("p");
    paragraph.className = kind;
    paragraph.textContent = text;
    talk.append(paragraph);
    talk.scrollTop = talk.scrollHeight;
    return paragraph;
  }

  async function ask(path, body, paragraph) {
    const control = new AbortController();
    running.add(control);
    byId("stop").disabled = false;
    try {
      const answer = await fetch(path, {
        method: "POST", signal: control.signal,
        headers: { "Content-Type": "application/json", ...headers() },
        body: JSON.stringify({ ...body, stream: true }),
      });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      for await (const text of events(answer)) {
        if (text === "[DONE]") break;
        const data = JSON.parse(text);
        if (data.error) throw new Error(data.error.message);
        for (const choice of data.choices) paragraph.textContent += (choice.delta ? choice.delta.content : choice.text) || "";
        talk.scrollTop = talk.scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError") line(error.message, "error");
    } finally {
      running.delete(control);
      byId("stop").disabled = running.size === 0;
    }
  }

  byId("chat").addEventListener("submit", async (event) => {
    event.preventDefault();
    const said = byId("say").value.trim();
    if (!said) return;
    byId("say").value = "";
    conversation.push({ role: "user", content: said });
    line(said, "user");
    const paragraph = line("", "assistant");
    await ask("/v1/chat/completions", { messages: conversation, max_tokens: 256 }, paragraph);
    conversation.push({ role: "assistant", content: paragraph.textContent || "…" });
  });
  byId("say").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      byId("chat").requestSubmit();
    }
  });
  byId("many").addEventListener("click", () => {
    for (const prompt of PROMPTS) ask("/v1/completions", { prompt, max_tokens: 200 }, line(prompt, "assistant"));
  });
  byId("stop").addEventListener("click", () => { for (const control of running) control.abort(); });

  new ResizeObserver(() => { view.dirty = true; }).observe(document.body);
  readColours();
  drawLegend();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLegend);
  requestAnimationFrame(draw);
  connect();
})();

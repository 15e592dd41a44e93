"use strict";
// The block map: replays block events (coded by pagelab/report/blockmap.py) up to a step.
(() => {
  const { page, byId, settings, remember, figure, onTheme } = PageLab;
  const home = byId("blockmap");
  if (!home) return;
  const FREE = -1, CACHED = -2, HOLDERS = 10;

  // -- decoding

  const sums = (differences) => {
    let total = 0;
    return differences.map((difference) => (total += difference));
  };

  function decode(map) {
    if (map.events.length && Array.isArray(map.events)) {
      const entries = [];
      let step = 0, block = 0;
      for (let i = 0; i < map.events.length; i += 4) {
        step += map.events[i];
        block += map.events[i + 1];
        entries.push([step, block, map.events[i + 2], map.events[i + 3]]);
        block += map.events[i + 2];
      }
      map.entries = entries;
      map.times = sums(map.t).map((t) => t / 1e4);
      map.liveSlots = sums(map.live);
      map.savedSlots = sums(map.saved);
      map.waitingCount = sums(map.waiting);
      for (const request of map.requests) request.produced = tokenSteps(request.tokens);
      map.events = null;
    }
    return map;
  }

  function tokenSteps(coded) {
    const steps = [];
    let next = 0;
    for (let i = 0; i < coded.length; i += 2) {
      next += coded[i];
      for (let k = 0; k < coded[i + 1]; k += 1) steps.push(next++);
    }
    return steps;
  }

  function countUpTo(steps, step) {
    let low = 0, high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // Slots that the holders have written by the end of a step, as the ledger counted them in all.
  // After its first token a request has all of its prompt and tokens but the newest, which has no
  // K/V yet. What remains belongs to the prompts that are being computed, the earliest first.
  function writtenBy(map, step, held) {
    const tokens = new Map();
    let rest = map.liveSlots[step] + map.savedSlots[step];
    const computing = [];
    for (const [index, slots] of [...held].sort((a, b) => a[0] - b[0])) {
      const request = map.requests[index];
      const produced = request ? countUpTo(request.produced, step) : 0;
      if (produced > 0) {
        tokens.set(index, request.prompt + produced - 1);
        rest -= Math.min(slots, request.prompt + produced - 1);
      } else computing.push([index, Math.min(slots, request ? request.prompt : slots)]);
    }
    for (const [index, most] of computing) {
      const share = Math.max(0, Math.min(most, rest));
      tokens.set(index, share);
      rest -= share;
    }
    return tokens;
  }

  // -- the state at a step

  class Replay {
    constructor(map) {
      this.map = map;
      this.holder = new Int32Array(map.blocks);
      this.order = new Int32Array(map.blocks); // when it was taken: the order of a block table
      this.reset();
    }

    reset() {
      this.holder.fill(FREE);
      this.next = 0;
      this.step = -1;
      this.count = 0;
    }

    seek(step) {
      if (step < this.step) this.reset();
      const { entries } = this.map;
      while (this.next < entries.length && entries[this.next][0] <= step) {
        const [, first, run, holder] = entries[this.next++];
        for (let block = first; block < first + run; block += 1) {
          this.holder[block] = holder;
          this.order[block] = this.count++;
        }
      }
      this.step = step;
    }

    // Who holds what, and how many slots of each block are written.
    tables() {
      const { map, holder, order, step } = this;
      const tables = new Map();
      const filled = new Int32Array(map.blocks);
      let cached = 0;
      for (let block = 0; block < map.blocks; block += 1) {
        if (holder[block] === CACHED) cached += 1;
        if (holder[block] < 0) continue;
        if (!tables.has(holder[block])) tables.set(holder[block], { blocks: [], written: 0 });
        tables.get(holder[block]).blocks.push(block);
      }
      const held = [...tables].map(([index, table]) => [index, table.blocks.length * map.size]);
      const tokensOf = writtenBy(map, step, held);
      for (const [index, table] of tables) {
        table.blocks.sort((a, b) => order[a] - order[b]);
        const tokens = tokensOf.get(index);
        // More tokens than its blocks can hold: the first ones are in blocks that it shares.
        const shared = Math.max(0, Math.ceil(tokens / map.size) - table.blocks.length);
        table.blocks.forEach((block, i) => {
          filled[block] = Math.max(0, Math.min(map.size, tokens - (i + shared) * map.size));
          table.written += filled[block];
        });
      }
      return { tables, filled, cached };
    }
  }

  // -- colours, resolved from the page's CSS variables

  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  let colors = {};
  function readColors() {
    const value = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    colors = { holders: Array.from({ length: HOLDERS }, (_, i) => value(`holder-${i}`)) };
    for (const name of ["ink", "bg", "muted", "free", "free-ink", "cached", "cached-ink"]) {
      colors[name] = value(name);
    }
  }
  const colorOf = (index) => colors.holders[index % HOLDERS];
  const inkOn = (color) => {
    const [r, g, b] = color.match(/\d+(\.\d+)?/g).map(Number);
    return r * 0.299 + g * 0.587 + b * 0.114 > 150 ? "#14161a" : "#ffffff";
  };

  // -- one pane: a map, its figures, and who holds how much

  class Pane {
    constructor(element) {
      this.element = element;
      this.content = element.querySelector(".content");
      this.select = element.querySelector("select");
      this.canvas = element.querySelector("canvas");
      this.picked = null; // a request
      this.cursor = null; // a block
      this.canvas.addEventListener("pointermove", (event) => this.point(event));
      this.canvas.addEventListener("pointerdown", (event) => this.point(event));
      this.canvas.addEventListener("pointerleave", (event) => {
        if (event.pointerType === "mouse") this.pick(null, null); // what a finger picked stays
      });
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      new ResizeObserver(() => this.replay && this.paint()).observe(this.content);
    }

    setMap(index) {
      this.index = index;
      this.select.value = String(index);
      this.content.hidden = index < 0;
      this.replay = index < 0 ? null : new Replay(decode(page.maps[index]));
      this.picked = this.cursor = null;
    }

    // The step that was the latest one at a moment; beyond the end, `over` is set.
    setTime(time) {
      const { times } = this.replay.map;
      let step = countUpTo(times, time + 1e-9) - 1;
      this.over = time > times[times.length - 1] + 1e-9;
      this.setStep(Math.max(0, Math.min(step, times.length - 1)));
    }

    setStep(step) {
      this.replay.seek(step);
      this.state = this.replay.tables();
      this.figures();
      this.paint();
      this.list();
      this.describe();
    }

    figures() {
      const { map, step } = this.replay;
      const { tables, cached } = this.state;
      let held = 0, filled = 0;
      for (const table of tables.values()) {
        held += table.blocks.length * map.size;
        filled += table.written;
      }
      const line = this.element.querySelector(".figures");
      const strong = (text) => Object.assign(document.createElement("b"), { textContent: text });
      const end = map.times[map.times.length - 1];
      line.replaceChildren(strong(`${tables.size} running`), `, ${map.waitingCount[step]} waiting. `,
        strong(`${figure(held)} slots taken, ${figure(map.liveSlots[step])} live`),
        held ? ` (${Math.round((100 * map.liveSlots[step]) / held)} %)` : "",
        cached ? `, ${figure(cached * map.size)} cached` : "",
        `, of ${figure(map.blocks * map.size)}.`,
        this.over ? ` Finished after ${figure(end)} s.` : "");
      Object.assign(this.element.dataset, { step, held, written: filled, running: tables.size });
    }

    layout() {
      const width = this.canvas.clientWidth || 320;
      const blocks = this.replay.map.blocks;
      const choices = [8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048];
      let columns = choices.find((c) => Math.floor(width / c) <= 34 &&
        Math.ceil(blocks / c) * Math.floor(width / c) <= 460 && Math.floor(width / c) >= 1);
      columns ||= Math.max(1, Math.floor(width));
      const cell = Math.max(1, width / columns);
      return { width, columns, cell, rows: Math.ceil(blocks / columns) };
    }

    paint() {
      const shape = (this.shape = this.layout());
      const ratio = window.devicePixelRatio || 1;
      const height = Math.ceil(shape.rows * shape.cell) + 1;
      this.canvas.width = Math.round(shape.width * ratio);
      this.canvas.height = Math.round(height * ratio);
      this.canvas.style.height = `${height}px`;
      const context = this.canvas.getContext("2d");
      context.scale(ratio, ratio);
      for (let block = 0; block < this.replay.map.blocks; block += 1) this.paintBlock(context, block);
      if (this.cursor !== null) this.frame(context, this.cursor);
    }

    corner(block) {
      const { columns, cell } = this.shape;
      return [(block % columns) * cell, Math.floor(block / columns) * cell];
    }

    paintBlock(context, block) {
      const { cell, columns } = this.shape;
      const holder = this.replay.holder[block];
      const gap = cell >= 8 ? 1 : 0;
      const [x, y] = this.corner(block);
      const size = cell - gap;
      context.globalAlpha = this.picked !== null && holder !== this.picked ? 0.28 : 1;
      if (holder < 0) {
        context.fillStyle = holder === CACHED ? colors.cached : colors.free;
        context.fillRect(x, y, size, size);
        if (cell >= 8) {
          context.fillStyle = context.strokeStyle = holder === CACHED ? colors["cached-ink"] : colors["free-ink"];
          if (holder === CACHED) for (let k = 0.25; k < 1; k += 0.25) context.fillRect(x, y + k * size, size, 1);
          else context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
        }
      } else {
        this.paintHeld(context, block, x, y, size);
        const fresh = block % columns === 0 || this.replay.holder[block - 1] !== holder;
        if (cell >= 15 && fresh) this.number(context, holder, block, x, y, size);
      }
      context.globalAlpha = 1;
    }

    paintHeld(context, block, x, y, size) {
      const color = colorOf(this.replay.holder[block]);
      const share = this.state.filled[block] / this.replay.map.size;
      const alpha = context.globalAlpha;
      if (share < 1) {
        context.globalAlpha = alpha * 0.16;
        context.fillStyle = color;
        context.fillRect(x, y, size, size);
        if (size >= 6) this.stripes(context, color, alpha, x, y, size);
      }
      context.globalAlpha = alpha;
      context.fillStyle = color;
      context.fillRect(x, y, size * share, size);
    }

    stripes(context, color, alpha, x, y, size) {
      context.save();
      context.beginPath();
      context.rect(x, y, size, size);
      context.clip();
      context.globalAlpha = alpha * 0.55;
      context.strokeStyle = color;
      context.lineWidth = 1;
      context.beginPath();
      const pitch = size >= 14 ? 6 : 4;
      for (let k = -size; k < size; k += pitch) {
        context.moveTo(x + k, y + size);
        context.lineTo(x + k + size, y);
      }
      context.stroke();
      context.restore();
    }

    number(context, holder, block, x, y, size) {
      context.font = `600 ${Math.min(12, size * 0.5)}px -apple-system, "Segoe UI", Roboto, Arial, sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      const share = this.state.filled[block] / this.replay.map.size;
      context.fillStyle = share > 0.9 ? inkOn(colorOf(holder)) : colors.ink;
      if (share > 0.1 && share <= 0.9) { // half on colour: set apart from both halves
        context.strokeStyle = colors.bg;
        context.lineWidth = 3;
        context.lineJoin = "round";
        context.strokeText(String(holder + 1), x + size / 2, y + size / 2 + 0.5);
      }
      context.fillText(String(holder + 1), x + size / 2, y + size / 2 + 0.5);
    }

    frame(context, block) {
      const [x, y] = this.corner(block);
      context.lineWidth = 2;
      context.strokeStyle = colors.ink;
      context.strokeRect(x + 0.5, y + 0.5, this.shape.cell - 1, this.shape.cell - 1);
    }

    point(event) {
      const box = this.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / this.shape.cell);
      const row = Math.floor((event.clientY - box.top) / this.shape.cell);
      const block = row * this.shape.columns + Math.min(column, this.shape.columns - 1);
      if (block >= 0 && block < this.replay.map.blocks) this.pickBlock(block);
    }

    key(event) {
      const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.shape.columns, ArrowUp: -this.shape.columns };
      if (event.key === "Escape") return this.pick(null, null);
      if (!(event.key in moves)) return undefined;
      event.preventDefault();
      const to = this.cursor === null ? 0 : this.cursor + moves[event.key];
      if (to >= 0 && to < this.replay.map.blocks) this.pickBlock(to);
      return undefined;
    }

    pickBlock(block) {
      if (block === this.cursor) return;
      const holder = this.replay.holder[block];
      this.pick(block, holder >= 0 ? holder : null);
    }

    pick(block, request) {
      if (!this.replay) return;
      this.cursor = block;
      this.picked = request;
      this.paint();
      this.describe();
      for (const row of this.element.querySelectorAll(".holders tbody tr")) {
        row.classList.toggle("picked", Number(row.dataset.request) === request && request !== null);
      }
    }

    describe() {
      const info = this.element.querySelector(".info");
      if (this.cursor === null && this.picked === null) {
        info.textContent = "Point at a block, or move with the arrow keys, to see who holds it.";
        return;
      }
      const { map } = this.replay;
      const parts = [];
      const holder = this.cursor === null ? this.picked : this.replay.holder[this.cursor];
      if (this.cursor !== null) {
        const slot = this.cursor * map.size;
        parts.push(`Block ${this.cursor} (slots ${slot} to ${slot + map.size - 1})`);
      }
      if (holder < 0) parts.push(holder === CACHED ? "cached: held by nobody, reusable" : "in no allocation");
      const table = this.state.tables.get(holder);
      const request = map.requests[holder];
      if (table && request) {
        const tokens = countUpTo(request.produced, this.replay.step);
        if (this.cursor !== null) {
          const place = table.blocks.indexOf(this.cursor);
          parts.push(`number ${place + 1} of the ${table.blocks.length} blocks of request ${holder + 1}`,
            `${this.state.filled[this.cursor]} of its ${map.size} slots written`);
        }
        parts.push(`request ${holder + 1} is ${request.id}: ${request.prompt} tokens in, ${tokens} of ${request.max} out so far`);
      }
      info.textContent = parts.join("; ") + ".";
    }

    list() {
      const { map } = this.replay;
      const table = document.createElement("table");
      const head = table.createTHead().insertRow();
      for (const [name, kind] of [["Request", ""], ["Blocks", "n"], ["Slots", "n"], ["Written", "n"], ["Written of what it holds", ""]]) {
        const cell = head.appendChild(document.createElement("th"));
        Object.assign(cell, { textContent: name, className: kind, scope: "col" });
      }
      const body = table.createTBody();
      for (const [index, held] of [...this.state.tables].sort((a, b) => a[0] - b[0])) {
        body.append(this.listRow(index, held, held.blocks.length * map.size));
      }
      if (!this.state.tables.size) body.insertRow().insertCell().textContent = "Nobody holds a block at this step.";
      this.element.querySelector(".holders").replaceChildren(table);
    }

    listRow(index, held, slots) {
      const color = colorOf(index);
      const row = document.createElement("tr");
      row.dataset.request = index;
      const name = row.insertCell();
      const chip = name.appendChild(document.createElement("span"));
      Object.assign(chip, { className: "chip", textContent: index + 1 });
      chip.style.cssText = `background:${color};color:${inkOn(color)}`;
      name.append(` ${this.replay.map.requests[index]?.id ?? ""}`);
      for (const value of [held.blocks.length, slots, held.written]) {
        Object.assign(row.insertCell(), { className: "n", textContent: figure(value) });
      }
      const meter = row.insertCell().appendChild(document.createElement("span"));
      meter.className = "meter";
      meter.title = `${Math.round((100 * held.written) / slots)} % written`;
      meter.style.background = `repeating-linear-gradient(135deg, ${color} 0 1px, transparent 1px 5px)`;
      const bar = meter.appendChild(document.createElement("i"));
      bar.style.cssText = `width:${(100 * held.written) / slots}%;background:${color}`;
      row.addEventListener("pointerenter", () => this.pick(null, index));
      row.addEventListener("pointerleave", () => this.pick(null, null));
      return row;
    }
  }

  // -- both panes, the slider, and the address

  const [main, beside] = ["main", "beside"].map(
    (name) => new Pane(home.querySelector(`[data-pane="${name}"]`)));
  const slider = byId("step");

  function show(step) {
    const { map } = main.replay;
    slider.max = map.times.length - 1;
    const at = Math.max(0, Math.min(Number(step) || 0, map.times.length - 1));
    slider.value = at;
    main.setStep(at);
    if (beside.replay) beside.setTime(map.times[at]);
    const text = `${at} of ${map.times.length - 1}, ${figure(map.times[at])} s`;
    byId("step-text").textContent = text;
    slider.setAttribute("aria-valuetext", `step ${text}`);
    home.dataset.step = at;
  }

  function open() {
    const wanted = settings();
    const number = (name, fallback, least) => {
      const value = Number(wanted.get(name) ?? NaN);
      return Number.isInteger(value) && value >= least ? value : fallback;
    };
    const last = page.maps.length - 1;
    main.setMap(Math.min(number("map", page.view.map, 0), last));
    beside.setMap(Math.min(number("beside", page.view.beside, -1), last));
    show(number("step", page.view.step, 0));
  }

  let timer = null;
  function stop() {
    cancelAnimationFrame(timer);
    timer = null;
    byId("play").textContent = "Play";
    byId("play").setAttribute("aria-pressed", "false");
  }
  function play() {
    const total = main.replay.map.times.length;
    const start = Number(slider.value) >= total - 1 ? 0 : Number(slider.value);
    const begun = performance.now();
    const perSecond = Math.max(10, total / 20); // the whole run in 20 seconds at most
    byId("play").textContent = "Pause";
    byId("play").setAttribute("aria-pressed", "true");
    const frame = (now) => {
      const step = Math.min(total - 1, start + Math.floor(((now - begun) / 1000) * perSecond));
      if (step !== Number(slider.value)) show(step);
      if (step >= total - 1) return stop();
      timer = requestAnimationFrame(frame);
      return undefined;
    };
    timer = requestAnimationFrame(frame);
  }

  byId("play").addEventListener("click", () => {
    if (timer === null) return play();
    stop();
    return remember({ step: slider.value });
  });
  slider.addEventListener("input", () => { stop(); show(slider.value); });
  slider.addEventListener("change", () => remember({ step: slider.value }));
  main.select.addEventListener("change", () => {
    stop();
    const time = main.replay.map.times[Number(slider.value)];
    main.setMap(Number(main.select.value));
    show(countUpTo(main.replay.map.times, time) - 1); // the same moment in the other run
    remember({ map: main.index, step: slider.value });
  });
  beside.select.addEventListener("change", () => {
    beside.setMap(Number(beside.select.value));
    show(slider.value);
    remember({ beside: beside.index });
  });
  window.addEventListener("hashchange", () => { if (settings().size) { stop(); open(); } });
  onTheme(() => { readColors(); show(slider.value); });
  readColors();
  open();
})();

// The price chart and the market map, drawn on canvas. Neither knows where its data comes from.
import { bars, clock, squarify } from "./units.js";

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const STEPS = [5, 10, 15, 30, 60, 120, 240].map(m => m * 60000);

// A canvas in device pixels; returns its context and its size in CSS pixels.
function fit(canvas) {
  const { width, height } = canvas.parentElement.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  ctx.font = `11px ${css("--font")}`;
  return { ctx, width, height };
}

// Round numbers that divide a range into about so many parts.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(s => s * power >= raw) * power, out = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) out.push(v);
  return out;
}

export class Chart {
  constructor(canvas, tip, text) {
    Object.assign(this, { canvas, tip, text, data: null, cursor: null });
    canvas.chart = this;
    canvas.addEventListener("pointermove", e => this.point(e.offsetX));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("keydown", e => {
      if (e.key !== "ArrowLeft" && e.key !== "ArrowRight" || !this.model) return;
      const all = this.model.points, now = all.findIndex(p => p.middle >= (this.cursor ?? Infinity)), step = e.key === "ArrowRight" ? 1 : -1;
      this.at(all[Math.max(0, Math.min(all.length - 1, (now < 0 ? all.length : now) + step))]?.middle);
      e.preventDefault();
    });
  }

  // changes: an instrument's day; gaps: [from, to or null, reason]; alerts: [{at, severity, text}]; until: the newest poll.
  show(data) { this.data = data; this.draw(); }

  // Puts the crosshair on a moment, where it stays however the axis changes.
  at(ms) { this.cursor = ms; this.draw(); }

  draw() {
    const { ctx, width, height } = fit(this.canvas), d = this.data;
    this.model = null;
    if (!d || width < 60 || height < 60) return;
    const priced = d.changes.filter(c => c.last_price != null), fa = d.lang === "fa";
    if (!priced.length) {
      ctx.fillStyle = css("--dim"); ctx.textAlign = "center"; ctx.direction = fa ? "rtl" : "ltr";
      ctx.fillText(this.text("noData"), width / 2, height / 2);
      return;
    }
    const candle = d.kind === "candle", step = candle ? 300000 : 60000, list = bars(d.changes, step / 60000);
    const spans = d.gaps.map(([a, b, why]) => [a, b ?? Math.max(d.until, a), why]);
    const t0 = Math.floor(Math.min(priced[0].observed_at, ...spans.map(s => s[0])) / step) * step;
    const t1 = Math.max(d.until, list.at(-1).at + step, ...spans.map(s => s[1]), t0 + 10 * step);
    // The previous close is always in sight: a line that never leaves it must not look like a cliff.
    const values = priced.map(c => c.last_price).concat(d.previous ?? []);
    let low = Math.min(...values), high = Math.max(...values);
    const room = (high - low || high * 0.01 || 1) * 0.08;
    low -= room; high += room;
    const labels = ticks(low, high, Math.max(2, Math.floor(height / 60)));
    const gutter = Math.max(...[...labels, ...values.slice(-1), d.previous ?? 0].map(v => ctx.measureText(d.price(v)).width)) + 14;
    const right = width - gutter, base = height - 20, top = 8, mid = top + (base - top) * 0.74;
    const x = t => 4 + (t - t0) / (t1 - t0) * (right - 8), y = p => mid - (p - low) / (high - low) * (mid - top);
    // What was traded before the first poll belongs to its bar and would hide all others: that bar is cut off.
    const usual = list.filter(b => !b.opened).map(b => Math.abs(b.volume)), peak = Math.max(1, ...(usual.length ? usual : list.map(b => Math.abs(b.volume))));
    const below = Math.min(0, ...list.map(b => b.volume)), zero = base - Math.min(1, -below / peak) * 22 - 1, tall = zero - mid - 10;
    const pills = [priced.at(-1).last_price, ...(d.previous ? [d.previous] : [])], grid = css("--line"), ink = css("--dim"), up = css("--up"), down = css("--down"), warn = css("--warn");
    ctx.lineWidth = 1; ctx.textBaseline = "middle"; ctx.direction = "ltr";

    for (const [a, b] of spans) {
      ctx.save(); ctx.beginPath(); ctx.rect(x(a), top, Math.max(2, x(b) - x(a)), base - top); ctx.clip();
      ctx.fillStyle = css("--hatch"); ctx.fillRect(x(a), top, x(b) - x(a) + 2, base - top);
      ctx.strokeStyle = grid; ctx.beginPath();
      for (let i = x(a) - (base - top); i < x(b) + 2; i += 7) { ctx.moveTo(i, base); ctx.lineTo(i + base - top, top); }
      ctx.stroke(); ctx.restore();
    }
    ctx.strokeStyle = grid; ctx.fillStyle = ink; ctx.textAlign = "left";
    for (const v of labels) {
      ctx.beginPath(); ctx.moveTo(0, Math.round(y(v)) + .5); ctx.lineTo(right, Math.round(y(v)) + .5); ctx.stroke();
      if (pills.every(p => Math.abs(y(p) - y(v)) > 14)) ctx.fillText(d.price(v), right + 6, y(v));
    }
    const every = STEPS.find(s => (t1 - t0) / s * 54 < right) ?? STEPS.at(-1), zone = 12600000;   // Tehran's half hour
    ctx.textAlign = "center";
    for (let t = Math.ceil((t0 + zone) / every) * every - zone; t <= t1; t += every) {
      if (x(t) < 18 || x(t) > right - 18) continue;
      ctx.beginPath(); ctx.moveTo(Math.round(x(t)) + .5, top); ctx.lineTo(Math.round(x(t)) + .5, base); ctx.stroke();
      ctx.fillText(d.digits(clock(t, false)), x(t), base + 11);
    }
    const thick = Math.max(1, (x(t0 + step) - x(t0)) * 0.7);
    for (const b of list) {
      const h = Math.max(-22, Math.min(tall, b.volume / peak * (b.volume < 0 ? 22 : tall)));
      ctx.fillStyle = b.volume < 0 ? warn : (b.close ?? 0) >= (b.open ?? 0) ? up : down;
      ctx.globalAlpha = b.opened && usual.length ? .3 : .6;
      ctx.fillRect(x(b.at + step * .5) - thick / 2, zero, thick, -h || -1);
    }
    ctx.globalAlpha = 1;
    ctx.strokeStyle = ink; ctx.globalAlpha = .4; ctx.beginPath(); ctx.moveTo(0, zero + .5); ctx.lineTo(right, zero + .5); ctx.stroke(); ctx.globalAlpha = 1;

    const mark = d.previous ?? priced[0].last_price;
    if (d.previous) {
      ctx.setLineDash([4, 4]); ctx.strokeStyle = warn; ctx.beginPath(); ctx.moveTo(0, y(d.previous)); ctx.lineTo(right, y(d.previous)); ctx.stroke(); ctx.setLineDash([]);
    }
    if (candle) {
      for (const b of list.filter(each => each.close != null)) {
        ctx.strokeStyle = ctx.fillStyle = b.close >= b.open ? up : down;
        const cx = x(b.at + step / 2);
        ctx.beginPath(); ctx.moveTo(cx, y(b.high)); ctx.lineTo(cx, y(b.low)); ctx.stroke();
        ctx.fillRect(cx - thick / 2, Math.min(y(b.open), y(b.close)), thick, Math.max(1.5, Math.abs(y(b.open) - y(b.close))));
      }
    } else {
      // A step line, in pieces: within a gap nothing is known, so nothing is drawn.
      const pieces = [[]];
      for (const c of priced) {
        const before = pieces.at(-1).at(-1), gap = before && spans.find(([a, b]) => before.t <= a && c.observed_at >= b);
        if (gap) { pieces.at(-1).push({ t: gap[0], p: before.p }); pieces.push([]); }
        pieces.at(-1).push({ t: c.observed_at, p: c.last_price });
      }
      const tail = pieces.at(-1).at(-1), open = spans.find(([a, , ]) => a >= tail.t);
      pieces.at(-1).push({ t: Math.min(t1, open ? open[0] : d.until), p: tail.p });
      const trace = piece => { piece.forEach(({ t, p }, i) => { if (i) ctx.lineTo(x(t), y(piece[i - 1].p)); else ctx.moveTo(x(t), y(p)); ctx.lineTo(x(t), y(p)); }); };
      for (const [colour, from, to] of [[up, top - 8, y(mark)], [down, y(mark), mid + 8]]) {
        ctx.save(); ctx.beginPath(); ctx.rect(0, from, right, to - from); ctx.clip();
        for (const piece of pieces) {
          ctx.beginPath(); trace(piece); ctx.lineTo(x(piece.at(-1).t), y(mark)); ctx.lineTo(x(piece[0].t), y(mark));
          ctx.globalAlpha = .14; ctx.fillStyle = colour; ctx.fill(); ctx.globalAlpha = 1;
          ctx.beginPath(); trace(piece); ctx.strokeStyle = colour; ctx.lineWidth = 1.8; ctx.lineJoin = "round"; ctx.stroke(); ctx.lineWidth = 1;
        }
        ctx.restore();
      }
    }
    const price = t => { let found = priced[0]; for (const c of priced) if (c.observed_at <= t) found = c; return found.last_price; };
    for (const a of d.alerts) {
      if (a.at < t0 || a.at > t1) continue;
      const ax = x(a.at), ay = Math.max(top + 10, y(price(a.at)) - 8);
      ctx.fillStyle = a.severity === "CRITICAL" ? down : a.severity === "WARNING" ? warn : css("--hot");
      ctx.beginPath(); ctx.moveTo(ax, ay); ctx.lineTo(ax - 5, ay - 9); ctx.lineTo(ax + 5, ay - 9); ctx.fill();
    }
    const pill = (v, colour, dark) => {
      const h = 17, py = Math.max(h / 2, Math.min(mid, y(v)));
      ctx.fillStyle = colour; ctx.beginPath(); ctx.roundRect(right + 1, py - h / 2, gutter - 2, h, 4); ctx.fill();
      ctx.fillStyle = dark; ctx.textAlign = "left"; ctx.fillText(d.price(v), right + 6, py + .5);
    };
    if (d.previous) pill(d.previous, warn, css("--card"));
    pill(priced.at(-1).last_price, priced.at(-1).last_price >= mark ? up : down, css("--card"));
    const points = list.map(b => ({ ...b, middle: b.at + step / 2, x: x(b.at + step / 2) }));
    this.model = { x, points, right, top, base, spans, t: px => t0 + (px - 4) / (right - 8) * (t1 - t0), low, high, bars: list };
    Object.assign(this.canvas.dataset, { bars: list.length, last: d.changes.at(-1).sequence });
    if (this.cursor != null) this.cross(ctx);
  }

  point(px) { this.at(px == null || !this.model ? null : this.model.t(px)); if (px == null) this.tip.hidden = true; }

  cross(ctx) {
    const m = this.model, d = this.data, t = this.cursor, px = m.x(t), gap = m.spans.find(([a, b]) => t >= a && t <= b);
    const near = m.points.reduce((best, p) => Math.abs(p.x - px) < Math.abs(best.x - px) ? p : best, m.points[0]);
    const alerts = d.alerts.filter(a => Math.abs(m.x(a.at) - px) < 7);
    ctx.strokeStyle = css("--dim"); ctx.setLineDash([2, 3]); ctx.beginPath(); ctx.moveTo(gap ? px : near.x, m.top); ctx.lineTo(gap ? px : near.x, m.base); ctx.stroke(); ctx.setLineDash([]);
    this.tip.dir = d.lang === "fa" ? "rtl" : "ltr";
    const rows = gap ? [["gap", gap[2]], ["time", `${d.digits(clock(gap[0]))} – ${d.digits(clock(gap[1]))}`]] : [["time", d.digits(clock(near.at, false))],
      ...(d.kind === "candle" ? [["first", d.price(near.open)], ["high", d.price(near.high)], ["low", d.price(near.low)]] : []), ["last", d.price(near.close)], ["volume", d.amount(near.volume)]];
    this.tip.replaceChildren(...rows.concat(alerts.map(a => ["", a.text])).map(([word, value]) => {
      const line = document.createElement("div"), label = document.createElement("span"), shown = document.createElement("bdi");
      label.textContent = word && this.text(word); shown.textContent = value; line.append(label, " ", shown);
      return line;
    }));
    this.tip.hidden = false;
    const room = this.canvas.parentElement.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = Math.max(0, Math.min(room, px > m.right / 2 ? px - this.tip.offsetWidth - 12 : px + 12)) + "px";
  }
}

const mix = (a, b, k) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * k)).join()})`;
// White text has a contrast of 4.5 or more on each of these.
export const shade = p => p == null ? "#4a5361" : mix([74, 83, 97], p >= 0 ? [13, 118, 74] : [184, 38, 58], Math.min(1, Math.abs(p) / 4));

export class TreeMap {
  constructor(canvas, choose) {
    Object.assign(this, { canvas, cells: [], items: [] });
    const at = e => this.cells.find(c => e.offsetX >= c.x && e.offsetX < c.x + c.w && e.offsetY >= c.y && e.offsetY < c.y + c.h)?.item;
    canvas.addEventListener("click", e => { const item = at(e); if (item) choose(item.id); });
    canvas.addEventListener("pointermove", e => { canvas.title = at(e)?.hint() ?? ""; });
  }

  // items: [{id, size, percent, label, value, hint: a function}], the largest first.
  show(items) { this.items = items; this.draw(); }

  draw() {
    const { ctx, width, height } = fit(this.canvas), font = css("--font");
    this.cells = squarify(this.items, 0, 0, width, height);
    if (document.dir === "rtl") for (const c of this.cells) c.x = width - c.x - c.w;
    ctx.textAlign = "center"; ctx.textBaseline = "middle";
    for (const { x, y, w, h, item } of this.cells) {
      ctx.fillStyle = shade(item.percent);
      ctx.fillRect(x, y, Math.max(1, w - 1), Math.max(1, h - 1));
      ctx.fillStyle = "#fff"; ctx.font = `600 20px ${font}`; ctx.direction = "rtl";
      const fits = 19 * (w - 6) / Math.max(ctx.measureText(item.label).width, .8 * ctx.measureText(item.value).width), two = h > 26, size = Math.min(18, fits, two ? (h - 6) / 2 : h / 1.5);
      if (size < 7.5) continue;
      ctx.font = `600 ${size}px ${font}`;
      ctx.fillText(item.label, x + w / 2, y + h / 2 - (two ? size * .62 : 0));
      if (two) { ctx.font = `${size * .8}px ${font}`; ctx.direction = "ltr"; ctx.fillText(item.value, x + w / 2, y + h / 2 + size * .62); }
    }
  }
}

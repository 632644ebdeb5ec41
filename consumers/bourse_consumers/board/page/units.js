// Numbers, units, dates and names as the page shows them. Pure: known answers are in tests/consumers/test_board_page.py.
export const HEMMAT = 1e13; // rial
const PERSIAN = "۰۱۲۳۴۵۶۷۸۹", MINUS = "\u2212";

// Made once: `toLocaleString` makes one each time.
const formatter = options => { const format = new Intl.NumberFormat("en-US", options); return n => format.format(n); };
const whole = formatter({ maximumFractionDigits: 0 }), tenths = formatter({ maximumFractionDigits: 1 }), three = formatter({ maximumSignificantDigits: 3 }), six = formatter({ maximumSignificantDigits: 6 });

// Latin digits and signs as a language writes them.
export const localise = (text, lang) => lang === "fa" ? text.replace(/\d/g, d => PERSIAN[d]).replaceAll(",", "٬").replaceAll(".", "٫").replaceAll("%", "٪") : text;

export const int = (n, lang) => n == null ? "–" : localise(whole(n).replace("-", MINUS), lang);

// A price: whole rial, or toman with a decimal where there is one.
export function price(rial, unit, lang) {
  if (rial == null) return "–";
  return unit === "rial" ? int(rial, lang) : localise(tenths(rial / 10).replace("-", MINUS), lang);
}

// The change from a base in percent, null where it is not known: never from another price.
export const change = (now, base) => now == null || !base ? null : 100 * (now - base) / base;

export function percent(p, lang) {
  if (p == null) return "–";
  const text = Math.abs(p).toFixed(2);
  return localise((text === "0.00" ? "" : p > 0 ? "+" : MINUS) + text + "%", lang);
}

// Three significant digits and the name of the scale: [number, key of the word or ""].
function scaled(n, steps) {
  for (const [size, word] of steps) {
    // 999,950,000 is 1.00 billion and not 1,000 million.
    if (Math.abs(n) >= size * 0.9995) return [(Math.abs(n / size) >= 1000 ? six : three)(n / size), word];
  }
  return [whole(n), ""];
}

const join = ([number, word], lang, words) => signed(number, lang) + (word ? (lang === "fa" || word === "hemmat" ? "\u00a0" : "") + words[word] : "");

// In Persian text a sign stays at the left of its number.
const signed = (number, lang) => number[0] !== "-" ? localise(number, lang) : lang === "fa" ? `\u2066${MINUS}${localise(number.slice(1), lang)}\u2069` : MINUS + number.slice(1);

// A count of shares.
export const amount = (n, lang, words) => n == null ? "–" : join(scaled(n, [[1e9, "billion"], [1e6, "million"]]), lang, words);

// A sum of money, from rial; hemmat is a thousand billion toman, whatever the unit.
export function money(rial, unit, lang, words) {
  if (rial == null) return "–";
  if (Math.abs(rial) >= HEMMAT * 0.9995) return join(scaled(rial, [[HEMMAT, "hemmat"]]), lang, words);
  return amount(unit === "rial" ? rial : rial / 10, lang, words);
}

const clocks = {};
export function clock(ms, seconds = true) {
  if (ms == null) return "–";
  clocks[seconds] ??= new Intl.DateTimeFormat("en-GB", { timeZone: "Asia/Tehran", hour: "2-digit", minute: "2-digit", ...(seconds && { second: "2-digit" }) });
  return clocks[seconds].format(ms);
}

// 2019-08-21 → چهارشنبه ۳۰ مرداد ۱۳۹۸; from parts, because browsers order them differently.
export function date(day, lang) {
  if (!day) return "–";
  const style = { weekday: lang === "fa" ? "long" : "short", day: "numeric", month: lang === "fa" ? "long" : "short", year: "numeric", timeZone: "UTC" };
  const parts = new Intl.DateTimeFormat(lang === "fa" ? "fa-IR-u-ca-persian-nu-arabext" : "en-GB", style).formatToParts(new Date(day + "T12:00Z"));
  const part = name => parts.find(p => p.type === name).value;
  return ["weekday", "day", "month", "year"].map(part).join(" ");
}

// 2019-08-21 → ۱۳۹۸/۰۵/۳۰
export function shortDate(day, lang) {
  if (!day || lang !== "fa") return day || "–";
  const parts = new Intl.DateTimeFormat("fa-IR-u-ca-persian-nu-arabext", { day: "2-digit", month: "2-digit", year: "numeric", timeZone: "UTC" }).formatToParts(new Date(day + "T12:00Z"));
  return ["year", "month", "day"].map(name => parts.find(p => p.type === name).value).join("/");
}

// How names are compared: Arabic and Persian letters and digits alike, no spaces, no invisible marks.
export const plain = text => text.normalize("NFKC").replace(/[يى]/g, "ی").replace(/ك/g, "ک").replace(/[٠-٩]/g, d => d.charCodeAt(0) - 0x660).replace(/[۰-۹]/g, d => d.charCodeAt(0) - 0x6f0).replace(/[\s\p{Cf}]/gu, "").toLowerCase();

// What a screen may show of a text from outside: no control or direction characters, and not without end. A sentence may
// have isolates, which end with the element.
export const sentence = text => (text ?? "").replace(/[\p{Cc}\u200e\u200f\u202a-\u202e]/gu, " ").slice(0, 300);
export const safe = text => sentence(text).replace(/[\u2066-\u2069]/g, " ").slice(0, 200);

export const market = row => row.is_right || row.instrument.startsWith("IRR") ? "rights" : { IRO1: "bourse", IRO3: "farabourse", IRO5: "base", IRO7: "base" }[row.instrument.slice(0, 4)] ?? (row.instrument.startsWith("IRT") ? "funds" : "other");

// Bars of so many minutes as the contract defines them: by the time a change was observed, prices of last_price, sums of deltas.
export function bars(changes, minutes) {
  const found = new Map(), step = minutes * 60000;
  for (const c of changes) {
    const at = Math.floor(c.observed_at / step) * step;
    let bar = found.get(at);
    if (!bar) found.set(at, bar = { at, open: null, high: null, low: null, close: null, volume: 0, value: 0, count: 0, opened: false });
    if (c.last_price != null) {
      bar.open ??= c.last_price;
      bar.high = Math.max(bar.high ?? c.last_price, c.last_price);
      bar.low = Math.min(bar.low ?? c.last_price, c.last_price);
      bar.close = c.last_price;
    }
    bar.volume += c.volume_delta; bar.value += c.value_delta; bar.count += c.trade_count_delta;
    bar.opened ||= c.op === "OPENED";
  }
  return [...found.values()].sort((a, b) => a.at - b.at);
}

// A squarified treemap: [{x, y, w, h, item}] for items of a positive `size`, the largest first.
export function squarify(items, x, y, w, h) {
  const out = [], total = items.reduce((sum, i) => sum + i.size, 0);
  if (!total || w <= 0 || h <= 0) return out;
  const scale = w * h / total;
  let row = [], area = 0;
  const worst = (list, sum, side) => Math.max(side * side * list[0] / (sum * sum), sum * sum / (side * side * list.at(-1)));
  const lay = () => {
    const wide = w >= h, side = wide ? h : w, thick = area / side;
    let at = wide ? y : x;
    for (const { item, size } of row) {
      const long = size / thick;
      out.push(wide ? { x, y: at, w: thick, h: long, item } : { x: at, y, w: long, h: thick, item });
      at += long;
    }
    if (wide) { x += thick; w -= thick; } else { y += thick; h -= thick; }
    row = []; area = 0;
  };
  for (const item of items) {
    const size = item.size * scale, side = Math.min(w, h), sizes = row.map(r => r.size);
    if (row.length && worst([...sizes, size], area + size, side) > worst(sizes, area, side)) lay();
    row.push({ item, size }); area += size;
  }
  if (row.length) lay();
  return out;
}

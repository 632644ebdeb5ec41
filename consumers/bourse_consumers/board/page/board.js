// The page: keeps what the server sends, and draws what is in sight. Text reaches the page through textContent only.
import { WORDS } from "./words.js";
import * as units from "./units.js";
import { Chart, TreeMap, shade } from "./chart.js";

const $ = s => document.querySelector(s), $$ = s => [...document.querySelectorAll(s)];
const ROW_HEIGHT = 34, LOST_MS = 12000, HIDDEN_MS = 30000, STRIP = 60;
const stored = (key, fallback) => { try { return JSON.parse(localStorage.getItem("bourse." + key)) ?? fallback; } catch { return fallback; } };
const store = (key, value) => { try { localStorage.setItem("bourse." + key, JSON.stringify(value)); } catch { /* a private window */ } };
const whenIdle = globalThis.requestIdleCallback ?? (f => setTimeout(f));   // Safari has none
const prefers = query => matchMedia(query).matches;

// What a person chose; kept in this browser.
const chosen = {
  lang: stored("lang", "fa"), theme: stored("theme", prefers("(prefers-color-scheme: light)") ? "light" : "dark"), unit: stored("unit", "rial"),
  basis: stored("basis", "last"), kind: stored("kind", "line"), area: stored("area", "value"), which: stored("which", "up"), sort: stored("sort", ["value", -1]),
  chip: "all", search: "", severity: "", mine: false, sound: false, notify: false,
};
const watched = new Set(stored("watched", []));
let closed = "", muted = stored("muted", { day: null, ids: [] });

// What the server sent.
const rows = new Map();
let head = {}, polls = [], alerts = [], lastId = 0, day = null, current = null, selected = null, listed = [];
// What is known of the connection, and of alerts that came while the page was open.
let source = null, heard = 0, trouble = "", received = 0, frames = 0, paintMs = 0, known = null, fresh = new Set();

let words = {};
const t = (key, value) => { const text = words[key] ?? key; return value === undefined ? text : text.replace("{}", value); };
const int = n => units.int(n, chosen.lang), price = n => units.price(n, chosen.unit, chosen.lang), percent = p => units.percent(p, chosen.lang);
const amount = n => units.amount(n, chosen.lang, words), money = n => units.money(n, chosen.unit, chosen.lang, words);
// What has an amount of money below or after it names the unit; hemmat is one itself.
const MONEY = new Set(["last", "closing", "yesterday", "first", "high", "low", "value", "marketValue", "priceChange", "byValue"]);
const heading = key => t(key) + (MONEY.has(key) ? ` (${t(chosen.unit)})` : "");
const sum = n => { const text = money(n); return text.includes(t("hemmat")) ? text : `${text} ${t(chosen.unit)}`; };
const digits = text => units.localise(text, chosen.lang), clock = ms => digits(units.clock(ms));
const span = s => s < 100 ? t("seconds", int(s)) : s < 7200 ? t("minutes", int(s / 60)) : t("hours", int(s / 3600));
const joined = parts => parts.filter(Boolean).join(chosen.lang === "fa" ? "، " : " · ");   // a dot is Persian's zero
const sign = p => p > 0 ? "up" : p < 0 ? "down" : "";
const changeOf = (row, basis = chosen.basis) => basis === "last" ? row.change : row.closing_change;

function el(tag, text, ...classes) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  e.classList.add(...classes.filter(Boolean));
  return e;
}
// Numbers alone run from left to right in both languages, numbers with a Persian word from right to left.
const bdi = (text, ...classes) => el("bdi", text, ...classes);
const put = (e, text) => { if (e.textContent !== text) e.textContent = text; };

// --- what comes -------------------------------------------------------------------------------------------------------

function take(list) {
  for (const values of list) {
    const row = rows.get(values[0]) ?? {};
    current.forEach((name, i) => { row[name] = values[i]; });
    row.change = units.change(row.last_price, row.previous_close);
    row.closing_change = units.change(row.closing_price, row.previous_close);
    if (row.named !== row.symbol + row.title) {
      row.named = row.symbol + row.title;
      row.shown = [units.safe(row.symbol), units.safe(row.title)];
      row.plain = units.plain([...row.shown, row.instrument].join("\n")); row.market = units.market(row);
    }
    [row.symbol, row.title] = row.shown;
    row.changedAt = frames;
    rows.set(row.instrument, row);
  }
}

function apply(frame) {
  const began = performance.now();
  head = frame; received = heard = began; frames++; trouble = "";
  if (frame.day !== day) { day = frame.day; if (muted.day !== day) muted = { day, ids: [] }; }
  for (const id of frame.gone ?? []) rows.delete(id);
  take(frame.rows);
  const seen = new Set(polls.map(p => p.poll_sequence));
  polls = polls.concat(frame.polls.filter(p => !seen.has(p.poll_sequence))).slice(-STRIP);
  if (frame.alerts) takeAlerts(frame.alerts);
  if (!rows.has(selected?.id)) select(fromHash() ?? [...rows.values()].sort((a, b) => b.value - a.value)[0]?.instrument, false);
  if (frame.rows.length || frame.gone?.length) { arrange(); whenIdle(() => { movers(); map(); }, { timeout: 500 }); if (frame.rows.some(r => r[0] === selected?.id)) more(); else redraw(); } else { table(); redraw(); }
  if (frame.alerts) showAlerts();
  quote(); headline(); ops();
  paintMs = performance.now() - began;
  Object.assign(document.body.dataset, { frames, ms: paintMs.toFixed(1), poll: polls.at(-1)?.poll_sequence ?? "" });
}

async function begin() {
  clearTimeout(begin.again);
  let s;
  try {
    const answer = await fetch("api/snapshot");
    if (!answer.ok) throw new Error();
    s = await answer.json();
  } catch { trouble = lost(); headline(); begin.again = setTimeout(begin, 2000); return; }
  rows.clear(); polls = []; alerts = []; known = null; day = null; lastId = s.id; current = s.columns;
  if (s.font && !begin.font) { begin.font = true; const face = new FontFace("own", "url(font.woff2)"); document.fonts.add(face); face.load().then(redraw); }
  if (selected) selected.changes = null;
  try { apply(s); } finally { listen(); }   // what cannot be drawn is an error of the page, not of the connection
}

function listen() {
  source?.close();
  source = new EventSource("api/events?after=" + lastId);
  source.onmessage = e => { lastId = +e.lastEventId; apply(JSON.parse(e.data)); };
  source.onopen = () => { heard = performance.now(); };
  source.addEventListener("reset", () => { source.close(); begin(); });
  source.onerror = async () => {
    trouble = lost();
    headline();
    if (source.readyState !== EventSource.CLOSED) return;   // it tries again by itself
    const probe = await fetch("livez").catch(() => null);
    if (probe?.ok) { trouble = t("full"); headline(); }
    clearTimeout(begin.again);
    begin.again = setTimeout(listen, 3000 + Math.random() * 4000);
  };
}

// A page that nobody sees costs nothing; it goes on where it was.
document.addEventListener("visibilitychange", () => {
  clearTimeout(listen.hidden);
  if (document.hidden) listen.hidden = setTimeout(() => { source?.close(); source = null; }, HIDDEN_MS);
  else if (!source && current) { heard = performance.now(); listen(); }
});

// --- head -------------------------------------------------------------------------------------------------------------

const LAMP = { OPEN: "good", FRESH: "good", IDLE: "good", PRE_OPEN: "warn", PARTIAL: "warn", STALE: "bad", FROZEN: "bad", DOWN: "bad" };
const lost = () => t(head.notice ? "ended" : "lost");   // the last frame of a board that ends has its notice
const troubleOf = subject => t({ reading: "readingTrouble", groups: "groupsTrouble" }[subject] ?? subject);
const lately = () => (performance.now() - received) / 1000;
const outcome = p => p.outcome === "PUBLISHED" ? t("changed", int(p.opened + p.traded + p.revised + p.cancelled)) : t(p.outcome);
const errorOf = p => [p.error_kind, p.error_code, p.error_message].filter(Boolean).map(units.safe).join(": ");

function banner() {
  const p = polls.at(-1), waiting = heard && source && performance.now() - heard > LOST_MS;
  if (trouble) return trouble;
  if (waiting) return lost();
  if (!current) return t("reading");
  const found = (head.troubles ?? []).filter(each => each !== "groups").map(troubleOf);   // prices are current without the groups
  if (found.length) return joined([...new Set(found)]);
  if (!head.live) return t("reading");
  if (head.silent != null) return t("silent", span(head.silent + lately()));
  if (!p) return t("noPoll");
  if (p.outcome === "FAILED" || p.outcome === "SKIPPED") return `${t(p.outcome)}: ${errorOf(p)}`;
  return ["STALE", "FROZEN", "DOWN"].includes(p.feed_state) ? `${t(p.feed_state)}: ${t("feedBad")}` : "";
}

function chip(id, value, kind) {
  const e = $(id);
  put(e, value ? t(value) : "–");
  e.className = `chip ${kind} ${LAMP[value] ?? ""}`;
  e.dataset.value = value ?? "";
}

function headline() {
  const p = polls.at(-1), text = banner(), all = [...rows.values()];
  chip("#phase", p?.phase, ""); chip("#feed", p?.feed_state, "lamp");
  $("#feed").title = t("feedState");
  put($("#banner"), text); $("#banner").hidden = !text;
  $("#banner").classList.toggle("calm", text === t("ended"));
  document.body.classList.toggle("stale", !!text && !(p?.outcome === "SKIPPED"));
  $("#simulated").hidden = !p?.simulated;
  put($("#simulated"), t("simulated", units.shortDate(day, chosen.lang)));
  put($("#notice span"), units.sentence(head.notice?.[chosen.lang])); $("#notice").hidden = !head.notice || head.notice.en === closed;
  put($("#poll"), p ? joined([clock(p.received_at ?? p.requested_at), outcome(p)]) : "–");
  $("#poll").dataset.outcome = p?.outcome ?? "";
  const age = p?.latest_traded_at ? ((p.received_at ?? p.requested_at) - p.latest_traded_at) / 1000 + (p.simulated ? 0 : (head.poll_age ?? 0) + lately()) : null;
  put($("#newest"), age == null ? "–" : t("ago", span(Math.max(0, age))));
  put($("#date"), units.date(day, chosen.lang));
  put($("#turnover"), sum(all.reduce((total, r) => total + r.value, 0)));
  put($("#basis"), `${t("breadth")} ${t(chosen.basis === "last" ? "basisLast" : "basisClosing")}`);
  const changes = all.map(r => changeOf(r)), counts = [changes.filter(c => c > 0).length, changes.filter(c => c === 0).length, changes.filter(c => c < 0).length];
  fill($("#breadth"), counts, (e, n, i) => { e.className = ["up", "same", "down"][i]; e.style.flexGrow = n; put(e, n ? int(n) : ""); e.hidden = !n; });
  const most = Math.max(1, ...polls.map(x => x.opened + x.traded + x.revised + x.cancelled));
  fill($("#strip"), polls, (e, x) => {
    const n = x.opened + x.traded + x.revised + x.cancelled, bad = x.outcome === "FAILED" || x.outcome === "SKIPPED";
    e.className = bad ? "down" : n ? "up" : "same";
    e.style.height = (bad ? 100 : Math.max(12, 100 * n / most)) + "%";
    e.title = joined([clock(x.received_at ?? x.requested_at), outcome(x), bad && errorOf(x)]);
  });
  const issues = concerns();
  $("#lamp").className = "lamp " + (text && p?.outcome !== "SKIPPED" ? "bad" : issues.length ? "warn" : "good");
  $("#lamp").title = text || joined(issues) || t("allOk");
  $("#lamp").setAttribute("aria-label", `${t("details")}: ${$("#lamp").title}`);
  document.title = `${rows.get(selected?.id)?.symbol ?? "bourse"} · ${t(p?.phase ?? "market")}`;
}

function concerns() {
  return [["dead_letters", "deadLetters"], ["undecodable", "undecodable"], ["incomplete_polls", "incomplete"]].filter(([key]) => head[key]).map(([key, word]) => `${t(word)} ${int(head[key])}`)
    .concat((head.groups ?? []).filter(g => !g.alive || g.lag > 5000).map(g => `${g.name}: ${g.alive ? `${t("lag")} ${int(g.lag)}` : t("stopped")}`), (head.troubles ?? []).filter(each => each === "groups").map(troubleOf));
}

// As many <i> as values, each set by a function.
function fill(parent, values, set) {
  while (parent.children.length < values.length) parent.append(el("i"));
  while (parent.children.length > values.length) parent.lastChild.remove();
  values.forEach((value, i) => set(parent.children[i], value, i));
}

// --- table ------------------------------------------------------------------------------------------------------------

// key, width, narrowest table that has it, text, class. The name takes the rest.
const COLUMNS = [
  ["star", 34, 0], ["symbol", 0, 0],
  ["last", 86, 0, r => price(r.last_price), r => sign(r.change)], ["change", 78, 0, r => percent(r.change), r => sign(r.change)],
  ["closing", 104, 520, r => price(r.closing_price), r => sign(r.closing_change)], ["closing_change", 78, 600, r => percent(r.closing_change), r => sign(r.closing_change)],
  ["volume", 104, 720, r => amount(r.volume)], ["value", 112, 400, r => money(r.value)], ["count", 76, 800, r => int(r.trade_count)], ["time", 78, 880, r => clock(r.traded_at)],
];
const KEYS = { last: r => r.last_price, closing: r => r.closing_price, change: r => r.change, closing_change: r => r.closing_change, volume: r => r.volume, value: r => r.value, count: r => r.trade_count, time: r => r.traded_at };
const CHIPS = { all: () => true, watchList: r => watched.has(r.instrument), bourse: 1, farabourse: 1, base: 1, funds: 1, rights: 1, other: 1 };
let columns = [];

function layout() {
  const width = $("#scroll").clientWidth;
  columns = COLUMNS.filter(c => width >= c[2]);
  const name = { change: `${t("last")} ${digits("%")}`, closing_change: `${t("closing")} ${digits("%")}`, star: "★" };
  $("#scroll colgroup").replaceChildren(...columns.map(c => { const e = el("col"); if (c[1]) e.style.width = c[1] + "px"; return e; }));
  $("#scroll thead tr").replaceChildren(...columns.map(c => {
    const e = el("th", undefined, c[3] ? "n" : "", c[0]), b = el("button", name[c[0]] ?? heading(c[0]), "plain");
    b.dataset.sort = c[0]; e.scope = "col"; b.title = b.textContent;
    if (chosen.sort[0] === c[0]) e.setAttribute("aria-sort", chosen.sort[1] > 0 ? "ascending" : "descending");
    e.append(b);
    return e;
  }));
  $("#scroll tbody").replaceChildren();
}

function arrange() {
  const filter = units.plain(chosen.search), [key, way] = chosen.sort, value = KEYS[key], chipped = CHIPS[chosen.chip];
  listed = [...rows.values()].filter(r => (chipped === 1 ? r.market === chosen.chip : chipped(r)) && (!filter || r.plain.includes(filter)));
  const compare = value ? (a, b) => (value(a) == null) - (value(b) == null) || way * (value(a) - value(b)) : key === "star"
    ? (a, b) => watched.has(b.instrument) - watched.has(a.instrument) : (a, b) => way * a.symbol.localeCompare(b.symbol, "fa");
  listed.sort((a, b) => compare(a, b) || (a.instrument < b.instrument ? -1 : 1));
  put($("#count"), listed.length === rows.size ? int(rows.size) : t("total", "").includes("{}") ? "" : words.total.replace("{}", int(listed.length)).replace("{}", int(rows.size)));
  table();
}

// Only the rows in sight exist.
function table() {
  const box = $("#scroll"), body = $("#scroll tbody"), top = box.scrollTop;
  const begin = Math.max(0, Math.floor(top / ROW_HEIGHT) - 2), shown = listed.slice(begin, begin + Math.ceil(box.clientHeight / ROW_HEIGHT) + 4);
  box.setAttribute("aria-rowcount", listed.length);
  while (body.children.length < shown.length + 2) body.append(line());
  while (body.children.length > shown.length + 2) body.lastChild.remove();
  const lines = [...body.children];
  spacer(lines[0], begin); spacer(lines.at(-1), listed.length - begin - shown.length);
  shown.forEach((r, i) => show(lines[i + 1], r, begin + i));
}

function line() {
  const e = el("tr");
  for (const c of columns) {
    const cell = el("td", undefined, c[3] ? "n" : "", c[0]);
    if (c[0] === "star") cell.append(el("button", "☆", "plain"));
    else if (c[0] === "symbol") { const box = el("div"), title = el("small"); title.dir = "auto"; box.append(el("bdi"), title); cell.append(box); } else cell.append(bdi(""));
    e.append(cell);
  }
  return e;
}

function spacer(e, count) {
  e.className = "space"; e.ariaHidden = true; delete e.dataset.id; e.removeAttribute("aria-rowindex");
  e.style.height = count * ROW_HEIGHT + "px";
  e.hidden = !count;
}

function show(e, r, index) {
  const same = e.dataset.id === r.instrument;
  if (e.className === "space") { e.style.height = ""; e.hidden = false; e.ariaHidden = null; }
  e.className = r.instrument === selected?.id ? "on" : "";
  e.dataset.id = r.instrument;
  e.setAttribute("aria-rowindex", index + 1);
  columns.forEach((c, i) => {
    const cell = e.children[i];
    if (c[0] === "star") {
      const b = cell.firstChild, on = watched.has(r.instrument);
      put(b, on ? "★" : "☆"); b.dataset.star = r.instrument; b.setAttribute("aria-pressed", on); b.setAttribute("aria-label", `${t("watchList")}: ${r.symbol}`);
    } else if (c[0] === "symbol") { put(cell.firstChild.firstChild, r.symbol); put(cell.firstChild.lastChild, r.title); cell.title = `${r.symbol} · ${r.title}`; } else {
      const text = c[3](r), before = cell.firstChild.textContent, kind = c[4]?.(r) ?? "";
      if (before === text) return;
      cell.firstChild.textContent = text; cell.firstChild.className = kind;
      if (same && before && c[0] === "last" && r.changedAt === frames && !prefers("(prefers-reduced-motion: reduce)")) {
        cell.animate([{ background: `color-mix(in srgb, var(--${kind === "down" ? "down" : "up"}) 35%, transparent)` }, { background: "transparent" }], 900);
      }
    }
  });
}

function star(id) {
  if (!watched.delete(id)) watched.add(id);
  store("watched", [...watched]); arrange(); quote(); showAlerts();
}

// --- instrument -------------------------------------------------------------------------------------------------------

const fromHash = () => { try { const id = decodeURIComponent(location.hash.slice(2)); return rows.has(id) ? id : undefined; } catch { return undefined; } };
const FACTS = [["yesterday", r => price(r.previous_close)], ["first", r => price(r.open_price)], ["high", r => price(r.high_price)], ["low", r => price(r.low_price)],
  ["volume", r => amount(r.volume)], ["value", r => money(r.value)], ["count", r => int(r.trade_count)], ["marketValue", r => money(r.market_value)]];

function select(id, go = true, moment = null) {
  if (!id || !rows.has(id)) return;
  const was = selected?.id;
  if (id !== was) { selected = { id, changes: null, moment }; more(); } else if (moment) selected.moment = moment;
  if (go) {
    if (location.hash !== "#/" + id) location.hash = "#/" + id;
    if (moment) chart.at(moment);
    if (innerWidth < 700 && document.body.dataset.tab !== "instrument") tab("instrument");
  }
  quote(); table();
}

// Fetches the changes after those that are here.
async function more() {
  const mine = selected, columnsOf = (names, values) => Object.fromEntries(names.map((name, i) => [name, values[i]]));
  if (!mine || mine.busy) return;
  mine.busy = true;
  try {
    const answer = await fetch(`api/day/${encodeURIComponent(mine.id)}?after=${mine.changes?.at(-1)?.sequence ?? 0}`);
    if (answer.ok) {
      const found = await answer.json(), list = found.changes.map(values => columnsOf(found.columns, values));
      mine.changes = mine.changes && found.trading_day === mine.day ? mine.changes.concat(list) : list;
      mine.day = found.trading_day; mine.polls = { ...mine.polls, ...found.poll_ids };
    }
  } catch { /* the banner shows it */ }
  mine.busy = false;
  if (mine === selected) { redraw(); provenance(); if (mine.moment) { chart.at(mine.moment); mine.moment = null; } }
}

function quote() {
  const r = rows.get(selected?.id);
  if (!r) return;
  put($("#name"), r.symbol);
  $("#name").title = r.title;
  const on = watched.has(r.instrument);
  put($("#star"), on ? "★" : "☆"); $("#star").setAttribute("aria-pressed", on);
  const part = (word, value, p) => { const e = el("div"); e.append(el("small", heading(word)), bdi(price(value), "big", sign(p)), bdi(percent(p), sign(p))); return e; };
  const title = el("div", undefined, "title");
  title.append(el("bdi", r.title), el("small", joined([t(r.market), r.instrument, `${t("lastTrade")} ${clock(r.traded_at)}`])));
  $("#quote").replaceChildren(title, part("last", r.last_price, r.change), part("closing", r.closing_price, r.closing_change));
  $("#facts").replaceChildren(...FACTS.map(([word, text]) => { const e = el("div"); e.append(el("dt", heading(word)), el("dd")); e.lastChild.append(bdi(text(r))); if (text(r) === "–") e.lastChild.title = t("notSent"); return e; }));
  $("#plot canvas").setAttribute("aria-label", `${t("chart")}: ${r.symbol}, ${heading("last")} ${price(r.last_price)}, ${percent(r.change)}`);
}

function redraw() {
  const r = rows.get(selected?.id), p = polls.at(-1);
  if (!r) return;
  const own = alerts.filter(a => a.instrument === r.instrument).map(a => ({ at: a.raised_at, severity: a.severity, text: wording(a) }));
  const last = selected.changes?.at(-1)?.observed_at ?? 0, until = Math.max(last, p?.phase === "OPEN" ? p.received_at ?? p.requested_at : p?.latest_traded_at ?? 0);
  chart.show({ changes: selected.changes ?? [], previous: r.previous_close || null, gaps: (head.gaps ?? []).map(([a, b, why]) => [a, b, units.safe(why) || t("gap")]), alerts: own, kind: chosen.kind, lang: chosen.lang, until, price, amount, digits });
}

function provenance() {
  if (!$("#source").open || !selected?.changes) return;
  const compact = (selected.day ?? "").replaceAll("-", ""), list = selected.changes.slice(-20).reverse(), unit = chosen.unit === "rial" ? 1 : 10;
  const signed = (n, size = 1) => n == null ? "–" : digits((n > 0 ? "+" : "") + (n / size).toLocaleString("en-US").replace("-", "\u2212"));
  const heads = ["observed", "kind", "last", "priceChange", "volume", "value", "count", "event", "place", "track"];
  $("#source thead tr").replaceChildren(...heads.map(h => el("th", heading(h))));
  $("#source tbody").replaceChildren(...list.map(c => {
    const e = el("tr"), id = `${selected.id}-${compact}-${c.sequence}`;
    const cells = [clock(c.observed_at), t(c.op), price(c.last_price), signed(c.last_price_delta, unit), signed(c.volume_delta), signed(c.value_delta, unit), signed(c.trade_count_delta), id, `${c.partition} / ${c.offset}`, selected.polls[c.poll_sequence] ?? "–"];
    e.append(...cells.map((text, i) => { const cell = el("td"); cell.append(i === 1 ? el("span", text, c.op === "CANCELLED" ? "down" : "") : bdi(text)); return cell; }));
    e.dataset.event = id;
    return e;
  }));
  put($("#tail"), list.length ? `bourse tail trades --from-beginning --exit-at-end --json --with-metadata --key ${selected.id} | grep '"${selected.id}-${compact}-${list[0].sequence}"'` : "");
}

// --- map, movers ------------------------------------------------------------------------------------------------------

function map() {
  const all = [...rows.values()], valued = all.some(r => r.market_value);
  $("#area [data-area=market_value]").disabled = !valued; $("#area [data-area=market_value]").title = valued ? "" : t("notSent");
  const key = valued ? chosen.area : "value";
  $$("#area button").forEach(b => b.setAttribute("aria-pressed", b.dataset.area === key));
  const items = all.filter(r => r[key] > 0).sort((a, b) => b[key] - a[key]).slice(0, 200);
  tree.show(items.map(r => ({ id: r.instrument, size: r[key], percent: changeOf(r), label: r.symbol, value: percent(changeOf(r)), hint: () => `${r.symbol} · ${r.title}\n${joined([`${price(r.last_price)} ${t(chosen.unit)}`, percent(changeOf(r)), sum(r[key])])}` })));
}

function movers() {
  const which = chosen.which, size = r => which === "value" ? r.value : Math.abs(changeOf(r) ?? 0), way = which === "up" ? 1 : -1;
  const list = [...rows.values()].filter(r => which === "value" ? r.value : changeOf(r) * way > 0).sort((a, b) => size(b) - size(a)).slice(0, 15), most = size(list[0] ?? { value: 1 }) || 1;
  $("#movers ol").replaceChildren(...(list.length ? list.map(r => {
    const e = el("li"), b = el("button", undefined, "plain"), m = el("i", undefined, sign(changeOf(r)));
    m.style.width = 100 * size(r) / most + "%"; b.dataset.id = r.instrument;
    const symbol = el("bdi", r.symbol), track = el("span");
    track.append(m); b.append(symbol, track, bdi(which === "value" ? money(r.value) : percent(changeOf(r)), sign(changeOf(r)))); b.title = r.title;
    e.append(b);
    return e;
  }) : [el("li", t("none"), "dim", "empty")]));
  $$("#which button").forEach(b => b.setAttribute("aria-pressed", b.dataset.which === which));
}

// --- alerts -----------------------------------------------------------------------------------------------------------

const wording = a => units.sentence(a.message?.[chosen.lang] ?? Object.values(a.message ?? {})[0] ?? a.title ?? a.when);
const nameOf = a => units.safe(a.symbol ?? a.instrument ?? t(a.scope === "FEED" ? "feedScope" : "marketScope"));

function takeAlerts(list) {
  alerts = list;
  const before = known;
  known = new Set(list.map(a => a.alert_id));
  if (before) {
    const news = list.filter(a => !before.has(a.alert_id) && !a.resolved_at);
    news.forEach(a => fresh.add(a.alert_id));
    const audible = news.filter(isListed);
    if (audible.length && chosen.sound) beep();
    if (audible.length && chosen.notify && globalThis.Notification?.permission === "granted") {
      try { new Notification(nameOf(audible[0]), { body: wording(audible[0]), tag: audible[0].alert_id }); } catch { /* Chrome on Android has none */ }
    }
  }
}

const isMuted = a => muted.ids.includes("rule " + a.rule) || a.instrument && muted.ids.includes("symbol " + a.instrument);
const isListed = a => (!chosen.severity || a.severity === chosen.severity) && (!chosen.mine || watched.has(a.instrument)) && !isMuted(a);

function beep() {
  const audio = beep.audio ??= new AudioContext(), tone = audio.createOscillator(), gain = audio.createGain();
  gain.gain.setValueAtTime(.12, audio.currentTime); gain.gain.exponentialRampToValueAtTime(.001, audio.currentTime + .4);
  tone.frequency.value = 880; tone.connect(gain).connect(audio.destination); tone.start(); tone.stop(audio.currentTime + .4);
}

function showAlerts() {
  const groups = new Map(), list = alerts.filter(isListed), hidden = alerts.filter(isMuted).length, box = $("#groups");
  const rank = a => (a.resolved_at ? 0 : 10) + ["INFO", "WARNING", "CRITICAL"].indexOf(a.severity);
  for (const a of [...list].sort((x, y) => rank(y) - rank(x) || y.raised_at - x.raised_at)) groups.set(a.rule, [...groups.get(a.rule) ?? [], a]);
  const opened = list.filter(a => !a.resolved_at).length, folded = new Set([...box.querySelectorAll("details:not([open])")].map(e => e.dataset.rule)), mute = (kind, id, word) => { const b = el("button", "⊘", "plain", "mute"); b.dataset.mute = `${kind} ${id}`; b.title = t(word); b.setAttribute("aria-label", `${t(word)}: ${id}`); return b; };
  put($("#open"), t("open", int(opened)));
  $("#open").className = "chip " + (opened ? "warn" : "");
  box.replaceChildren(...[...groups].map(([rule, items]) => {
    const e = el("details"), s = el("summary"), active = items.filter(a => !a.resolved_at).length;
    e.dataset.rule = rule; e.open = !folded.has(rule);
    s.append(el("b", units.safe(items[0].title ?? rule)), el("span", words.total.replace("{}", int(active)).replace("{}", int(items.length)), "dim"), mute("rule", rule, "muteRule"));
    e.append(s, ...items.slice(0, 100).map(a => {
      const row = el("div", undefined, "alert", a.severity, a.resolved_at ? "over" : "", fresh.has(a.alert_id) ? "fresh" : ""), b = el("button", undefined, "plain"), first = el("span");
      b.dataset.alert = a.alert_id;
      first.append(el("b", nameOf(a)), " ", el("small", joined([clock(a.raised_at), a.resolved_at && t("resolved", clock(a.resolved_at))])));
      const text = el("span"), parts = chosen.lang === "en" ? wording(a).split(/((?:[\u0600-\u06ff\u200c]+ ?)+(?<! ))/) : [wording(a)];
      text.append(...parts.map((part, i) => i % 2 ? bdi(part) : part));   // a Persian name must not turn an English sentence around
      text.dir = a.message?.[chosen.lang] ? document.dir : "auto"; b.append(first, text); row.append(b); row.title = t(a.severity);
      if (a.instrument) row.append(mute("symbol", a.instrument, "muteSymbol"));
      return row;
    }));
    return e;
  }), ...(list.length ? [] : [el("p", t("noAlerts"), "dim", "empty")]));
  if (hidden) { const b = el("button", t("muted", int(hidden)), "plain", "unmute"); box.append(b); }
}

// --- ops --------------------------------------------------------------------------------------------------------------

function ops() {
  const box = $("#ops"), on = location.hash === "#/ops";
  box.hidden = !on; $("main").hidden = on;
  document.body.classList.toggle("ops", on);
  if (!on) return;
  const card = (title, heads, lines) => {
    const e = el("section", undefined, "card"), table = el("table"), h = el("tr"), bar = el("div", undefined, "bar"), scroll = el("div", undefined, "scroll");
    h.append(...heads.map(x => el("th", x)));
    h.hidden = !heads.some(Boolean);
    const thead = el("thead"), body = el("tbody");
    thead.append(h);
    body.append(...(lines.length ? lines : [[t("none")]]).map(cells => { const r = el("tr"); r.append(...cells.map(c => { const d = el("td"); d.append(el("bdi", c)); return d; })); return r; }));
    bar.append(el("h2", title)); table.append(thead, body); scroll.append(table); e.append(bar, scroll);
    return e;
  };
  const back = el("button", t("back")); back.id = "back";
  const counted = [["deadLetters", head.dead_letters], ["undecodable", head.undecodable], ["incomplete", head.incomplete_polls], ...["OPENED", "TRADED", "REVISED", "CANCELLED"].map(op => [op, head.totals?.[op]])];
  box.replaceChildren(back,
    card(t("groups"), ["", "", t("lag")], (head.groups ?? []).map(g => [g.name, t(g.alive ? "running" : "stopped"), int(g.lag)])),
    card(t("details"), ["", ""], [...(head.troubles ?? []).map(x => ["!", troubleOf(x)]), ...counted.map(([word, n]) => [t(word), int(n)])]),
    card(t("page"), ["", ""], [[t("frames"), int(frames)], [t("paint"), digits(paintMs.toFixed(1)) + " ms"]]),
    card(t("polls"), [t("time"), "#", t("outcome"), t("rows"), t("feedState"), t("track"), t("error")], [...polls].reverse().map(p => [clock(p.received_at ?? p.requested_at), int(p.poll_sequence), outcome(p), int(p.rows), t(p.feed_state), p.poll_id ?? "–", errorOf(p) || "–"])));
}

// --- choices ----------------------------------------------------------------------------------------------------------

const chart = new Chart($("#plot canvas"), $("#tip"), heading), tree = new TreeMap($("#tree canvas"), id => select(id));

function tab(name) { document.body.dataset.tab = name; $$("nav button").forEach(b => b.setAttribute("aria-current", b.dataset.tab === name)); resize(); }
function resize() { layout(); arrange(); redraw(); map(); }

// Everything that depends on language, theme or unit.
function speak() {
  words = Object.fromEntries(Object.entries(WORDS).map(([key, pair]) => [key, pair[chosen.lang === "fa" ? 0 : 1]]));
  const root = document.documentElement;
  root.lang = chosen.lang; root.dir = chosen.lang === "fa" ? "rtl" : "ltr"; root.dataset.theme = chosen.theme;
  $$("[data-t]").forEach(e => put(e, heading(e.dataset.t)));
  $("#search").placeholder = t("search"); $("#search").setAttribute("aria-label", t("search"));
  put($("#lang"), chosen.lang === "fa" ? "EN" : "فا"); put($("#unit"), t(chosen.unit));
  $("#theme").title = t(chosen.theme === "dark" ? "light" : "dark"); $("#theme").setAttribute("aria-label", $("#theme").title);
  $("#chips").replaceChildren(...Object.keys(CHIPS).map(key => { const b = el("button", t(key)); b.dataset.chip = key; b.setAttribute("aria-pressed", chosen.chip === key); return b; }));
  $("#severity").replaceChildren(...["", "INFO", "WARNING", "CRITICAL"].map(key => { const o = el("option", t(key || "anySeverity")); o.value = key; return o; }));
  $("#severity").value = chosen.severity; $("#severity").setAttribute("aria-label", t("anySeverity"));
  for (const key of ["sound", "notify", "mine"]) { $("#" + key).title = t(key); $("#" + key).setAttribute("aria-label", t(key)); $("#" + key).setAttribute("aria-pressed", chosen[key]); }
  $$("#kind button").forEach(b => b.setAttribute("aria-pressed", b.dataset.kind === chosen.kind));
  $(".legend").replaceChildren(...[-4, -2, 0, 2, 4].map(p => { const e = el("i", digits((p > 0 ? "+" : p < 0 ? "\u2212" : "") + Math.abs(p))); e.style.background = shade(p); return e; }));
  $("#tree canvas").setAttribute("aria-label", t("map")); $("#scroll").setAttribute("aria-label", t("instruments"));
  $("#star").setAttribute("aria-label", t("watchList")); $("#close").setAttribute("aria-label", t("close"));
  layout();
  if (current) { arrange(); quote(); redraw(); provenance(); map(); movers(); showAlerts(); ops(); }
  headline();
}

function choose(key, value) { chosen[key] = value; if (!["chip", "search", "severity", "mine", "sound", "notify"].includes(key)) store(key, value); speak(); }

document.addEventListener("click", async e => {
  const b = e.target.closest("button, [data-id]"), d = b?.dataset ?? {};
  if (!b) return;
  if (d.star) star(d.star);
  else if (d.mute) { e.preventDefault(); muted.ids.push(d.mute); store("muted", muted); showAlerts(); }
  else if (d.alert) { const a = alerts.find(x => x.alert_id === d.alert); fresh.delete(d.alert); showAlerts(); if (a?.instrument) select(a.instrument, true, a.raised_at); }
  else if (d.sort) { const [key, way] = chosen.sort; choose("sort", [d.sort, key === d.sort ? -way : d.sort === "symbol" ? 1 : -1]); $("#scroll").scrollTop = 0; arrange(); $(`[data-sort=${d.sort}]`)?.focus(); }
  else if (d.chip) { choose("chip", d.chip); $("#scroll").scrollTop = 0; arrange(); $(`[data-chip=${d.chip}]`).focus(); }
  else if (d.kind) choose("kind", d.kind);
  else if (d.area) choose("area", d.area);
  else if (d.which) choose("which", d.which);
  else if (d.tab) tab(d.tab);
  else if (d.id) select(d.id);
  else if (b.id === "lang") choose("lang", chosen.lang === "fa" ? "en" : "fa");
  else if (b.id === "theme") choose("theme", chosen.theme === "dark" ? "light" : "dark");
  else if (b.id === "unit") choose("unit", chosen.unit === "rial" ? "toman" : "rial");
  else if (b.id === "basis") choose("basis", chosen.basis === "last" ? "closing" : "last");
  else if (b.id === "lamp") location.hash = location.hash === "#/ops" ? "#/" + (selected?.id ?? "") : "#/ops";
  else if (b.id === "close") { closed = head.notice.en; headline(); }
  else if (b.id === "back") location.hash = "#/" + (selected?.id ?? "");
  else if (b.id === "star" && selected) star(selected.id);
  else if (b.id === "share") { try { await navigator.clipboard.writeText(location.href); } catch { prompt("", location.href); } put(b, t("copied")); setTimeout(() => put(b, t("share")), 1500); }
  else if (b.id === "sound") choose("sound", !chosen.sound);
  else if (b.id === "mine") choose("mine", !chosen.mine);
  else if (b.id === "notify") choose("notify", !chosen.notify && await globalThis.Notification?.requestPermission() === "granted");
  else if (b.classList.contains("unmute")) { muted.ids = []; store("muted", muted); showAlerts(); }
});
$("#search").addEventListener("input", e => { chosen.search = e.target.value; $("#scroll").scrollTop = 0; arrange(); });
$("#severity").addEventListener("change", e => choose("severity", e.target.value));
$("#source").addEventListener("toggle", e => { provenance(); e.target.scrollIntoView({ block: "nearest" }); });
$("#scroll").addEventListener("scroll", () => requestAnimationFrame(table), { passive: true });
addEventListener("hashchange", () => { ops(); const id = fromHash(); if (id) select(id, false); if (location.hash !== "#/ops") resize(); });
addEventListener("keydown", e => {
  const typing = /INPUT|SELECT/.test(document.activeElement.tagName);
  if (e.key === "/" && !typing) { e.preventDefault(); $("#search").focus(); }
  else if (e.key === "Escape" && typing) { $("#search").value = chosen.search = ""; arrange(); $("#scroll").focus(); }
  else if ((e.key === "ArrowDown" || e.key === "ArrowUp") && ["scroll", "search"].includes(document.activeElement.id)) {
    e.preventDefault();
    const now = listed.findIndex(r => r.instrument === selected?.id), next = Math.max(0, Math.min(listed.length - 1, now + (e.key === "ArrowDown" ? 1 : -1)));
    const box = $("#scroll"), y = next * ROW_HEIGHT;
    if (y < box.scrollTop) box.scrollTop = y; else if (y + 2 * ROW_HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = y + 3 * ROW_HEIGHT - box.clientHeight;
    select(listed[next]?.instrument, false); history.replaceState(null, "", "#/" + (selected?.id ?? ""));
  } else if (e.key === "Enter" && document.activeElement.id === "scroll") select(selected?.id);
});
let resizing = 0;
new ResizeObserver(() => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(() => { if (current) resize(); }); }).observe($("main"));
setInterval(headline, 1000);
speak(); tab("market"); begin();

"use strict";
// Polls /stats for new samples every second, and /plan after new prompts.

const SECONDS = 300, MEAN_OVER = 5, PLAN_EVERY = 5;
const $ = id => document.getElementById(id);
const ABOUT = {
  loading: "The model is being loaded and compiled.",
  failed: "The engine has failed. See the server's log.",
};
const NEEDS_KEY = "This page's data need an API key: start the server with --open-metrics to show them.";
const samples = [];
let stats = null, plan = null, planPrompts = -1, ticks = 0;

async function get(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (response.status === 401) throw new Error(NEEDS_KEY);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

async function tick() {
  try {
    const since = samples.at(-1)?.number ?? 0;
    stats = await get(`stats?since=${since}`);
    if (stats.samples.length && stats.samples[0].number > since + 1) samples.length = 0;
    samples.push(...stats.samples);
    samples.splice(0, samples.length - SECONDS);
    const hasEngine = stats.state === "ready" || stats.state === "draining";
    if (hasEngine && (plan === null || (ticks % PLAN_EVERY === 0 && stats.prompts !== planPrompts))) {
      planPrompts = stats.prompts;
      plan = await get("plan");
      drawPlan();
    }
    showState(stats.state);
    draw();
  } catch (error) {
    console.error(error);
    // The sample numbers of a restarted server start at 1 again.
    samples.length = 0;
    plan = null;
    showState("unreachable");
    if (error.message === NEEDS_KEY) $("about").textContent = NEEDS_KEY;
  }
  ticks += 1;
  setTimeout(tick, 1000);
}

function showState(state) {
  $("state").dataset.state = state;
  $("state").textContent = state;
}

/** The mean of a field over the last seconds; null values are left out. */
function recent(field, seconds = MEAN_OVER) {
  const values = samples.slice(-seconds).map(sample => sample[field]).filter(value => value !== null);
  return values.length ? mean(values) : null;
}

function draw() {
  const last = samples.at(-1);
  if (!last) return;
  if (!plan) $("about").textContent = ABOUT[stats.state] ?? "";
  const most = plan ? ` <small>of ${number.format(plan.max_num_seqs)}</small>` : "";
  $("running").innerHTML = number.format(last.running) + most;
  $("waiting").textContent = number.format(last.waiting);
  $("generation").textContent = number.format(recent("generation_tokens_per_s"));
  $("prompt").textContent = number.format(recent("prompt_tokens_per_s"));
  $("usage").textContent = last.used_pages.length
    ? percent.format(Math.max(...last.used_pages) / stats.pages_per_device) : "–";
  $("first-token").textContent = milliseconds(recent("first_token_ms", 60));
  $("interval").textContent = milliseconds(recent("interval_ms", 60));
  if (plan?.kept_tokens) {
    $("kept").textContent = percent.format(mean(plan.kept_tokens.flat()) / plan.mean_prompt_tokens);
  }
  drawPages(last);
  drawPrefixes(stats.prefixes);
  drawCharts();
  const parts = [`${number.format(stats.finished)} requests finished`];
  parts.push(`${number.format(stats.preemptions ?? 0)} preemptions`);
  parts.push(`${number.format(stats.compilations_after_ready)} compilations after ready`);
  $("footer").textContent = `${parts.join(" · ")} · fairkv_jax ${stats.version}`;
}

function milliseconds(value) {
  if (value === null) return "–";
  if (value >= 1995) return `${(value / 1e3).toFixed(1)} s`;
  return `${value < 10 ? value.toFixed(1) : number.format(value)} ms`;
}

function drawPages(last) {
  const used = last.used_pages, total = stats.pages_per_device;
  if (!used.length) return;
  const bars = $("pages");
  while (bars.children.length > used.length) bars.lastChild.remove();
  while (bars.children.length < used.length) {
    const row = document.createElement("div");
    row.innerHTML = '<span></span><div class="track"><div class="fill"></div><div class="mean"></div></div><span class="value"></span>';
    row.firstChild.textContent = `device ${bars.children.length}`;
    bars.append(row);
  }
  used.forEach((pages, device) => {
    const [, track, value] = bars.children[device].children;
    track.children[0].style.width = `${100 * pages / total}%`;
    track.children[1].style.left = `${100 * mean(used) / total}%`;
    value.innerHTML = `${number.format(pages)}<span class="wide"> of ${number.format(total)}</span> · ${percent.format(pages / total)}`;
  });
  const load = balance(last);
  $("pages-note").textContent = load === null
    ? "No tokens are cached. The dashed line is the mean."
    : `The mean load is ${percent.format(load)} of the fullest device's cached tokens. The dashed line is the mean.`;
}

function drawPrefixes(prefixes) {
  $("prefixes").hidden = prefixes === null;
  if (prefixes === null) return;
  const sharing = prefixes.sharing
    ? ` On average, ${prefixes.sharing.toFixed(1)} running requests begin with the same one.` : "";
  $("prefixes-note").textContent = `${number.format(prefixes.count)} prefixes hold ${megabytes(prefixes.bytes)} of the KV cache.`
    + sharing + (prefixes.recent.length < prefixes.count && prefixes.recent.length ? " The most recently used ones:" : "");
  $("prefixes-table").hidden = !prefixes.recent.length;
  $("prefixes-table").tBodies[0].replaceChildren(...prefixes.recent.map(prefix => {
    const row = document.createElement("tr");
    const cells = [prefix.num_tokens, prefix.kept_tokens].map(value => number.format(value));
    for (const text of [...cells, megabytes(prefix.bytes), number.format(prefix.num_requests)]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
}

function megabytes(bytes) {
  return `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 2 : 0)} MiB`;
}

/** The mean load of the devices divided by the fullest one's; null if nothing is cached. */
function balance(sample) {
  const most = Math.max(0, ...sample.kv_tokens);
  return most ? mean(sample.kv_tokens) / most : null;
}

function drawCharts() {
  const times = samples.map(sample => sample.time);
  const pick = get => samples.map(get);
  const total = stats.pages_per_device ?? 1;
  lineChart($("tokens-chart"), times, [
    { name: "a", area: true, values: smooth(pick(s => s.generation_tokens_per_s), MEAN_OVER) },
  ], { seconds: SECONDS, least: 10 });
  lineChart($("requests-chart"), times, [
    { name: "a", area: true, values: pick(s => s.running) },
    { name: "b", values: pick(s => s.waiting) },
  ], { seconds: SECONDS, least: 4 });
  lineChart($("balance-chart"), times, [
    { name: "a", area: true, values: pick(balance) },
  ], { seconds: SECONDS, least: 1, fixed: true, format: percent.format });
  const share = f => pick(s => (s.used_pages.length ? f(s.used_pages) / total : null));
  lineChart($("pages-chart"), times, [
    { name: "a", area: true, values: share(mean) },
    { name: "b", values: share(used => Math.max(...used)) },
  ], { seconds: SECONDS, least: 0.1, format: percent.format });
}

function drawPlan() {
  $("model").textContent = document.title = plan.model;
  $("about").textContent = `${plan.compression}; context of ${number.format(plan.max_model_len)} tokens; `
    + `KV cache of ${number.format(plan.kv_capacity_tokens)} tokens in all layers and heads`;
  $("plan-note").textContent = `Strategy ${plan.strategy}: ${plan.layers.length} layers with ${plan.num_heads} KV heads each `
    + `on ${plan.num_devices} devices, with ${plan.num_extra_replicas} extra replicas in total. `
    + `The planned utilization is ${percent.format(plan.utilization)}.`;
  const tokens = plan.kept_tokens ?? plan.layers.map(() => Array(plan.num_heads).fill(1));
  const known = plan.kept_tokens !== null;
  drawHeads(tokens, known);
  drawDevices(tokens, known);
}

function drawHeads(tokens, known) {
  const shade = shader(tokens.flat());
  const [least, most] = [Math.min, Math.max].map(f => number.format(f(...tokens.flat())));
  const cells = plan.layers.map((layerReplicas, layer) => tokens[layer].map((kept, head) => {
    const replicas = layerReplicas.filter(replica => replica.head === head);
    const devices = replicas.map(replica => `device ${replica.device} (${percent.format(replica.share)})`).join(", ");
    const framed = replicas.length > 1;
    const amount = known ? `${number.format(kept)} tokens, ` : "";
    return { shade: shade(kept), hint: amount + devices, framed, text: framed ? `${replicas.length}` : "" };
  }));
  heatMap($("heads-map"), cells, "head");
  $("heads-note").textContent = (known
    ? `Prompt tokens kept per head on average, from ${least} (light) to ${most} (dark). `
    : "After the first prompt, the shades show the tokens kept per head. ")
    + "Framed heads are replicated; the number is the number of replicas.";
}

function drawDevices(tokens, known) {
  const loads = plan.layers.map((replicas, layer) => {
    const load = Array(plan.num_devices).fill(0);
    for (const { head, device, share } of replicas) load[device] += share * tokens[layer][head];
    return load.map(value => value / mean(load));
  });
  const shade = shader([...loads.flat(), 1, 2 - Math.max(...loads.flat())]);
  const cells = plan.layers.map((layerReplicas, layer) => loads[layer].map((load, device) => {
    const replicas = layerReplicas.filter(replica => replica.device === device);
    const text = replicas.map(replica => `${replica.head}${replica.share < 1 ? "*" : ""}`).join(" ");
    const heads = replicas.map(replica => `${replica.head} (${percent.format(replica.share)})`).join(", ");
    return { shade: shade(load), hint: `${load.toFixed(2)} times the layer's mean; heads ${heads || "none"}`, text };
  }));
  heatMap($("devices-map"), cells, "device");
  const waste = mean(loads.map(load => Math.max(...load)));
  $("devices-note").textContent = "Each layer takes as long as its fullest device, so even rows are fast. "
    + `On average, the fullest device of a layer holds ${waste.toFixed(2)} times the layer's mean`
    + `${known ? "" : ", assuming that all heads keep the same number of tokens"}. `
    + "The cells list the heads; * marks replicas that serve only part of the rows.";
}

for (const svg of document.querySelectorAll(".charts svg")) followPointer(svg, drawCharts);
addEventListener("resize", () => {
  if (stats) drawCharts();
  if (plan) drawPlan();
});
tick();

/**
 * Runs a list of settings × seeds, and compares what comes out: one table, one picture (L0 against the adversary's KL).
 *
 *   npx tsx tools/sweep.ts --file sweep.json --out runs/sweep [--jobs 2]
 *
 * The file, in names of the config (those of config.json; `preset` besides):
 *
 *   { "base": { "preset": "toy", "nSteps": 500, "harvest": false },
 *     "seeds": [0, 1],
 *     "settings": { "paper": {}, "half": { "coeffImp": 2.5e-4 } } }
 *
 * Every run has its folder OUT/SETTING-seedN, with the run's own output as log.txt. Called again, the sweep leaves out
 * the runs that are finished and goes on with those that are not; one that fails stops no other. At the end, and after
 * every run, OUT/sweep.md and OUT/sweep.svg have what there is.
 */
import { spawn } from 'node:child_process';
import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { loadPair, readMetrics } from '../io/checkpoints.ts';
import { PRESETS } from '../io/presets.ts';
import { orRefuse, refuse } from '../io/usage-error.ts';
import { DEFAULTS } from '../nano-param-decomp.ts';
import { ladderOf } from '../postprocess/measures.ts';

const NANO = fileURLToPath(new URL('../nano-param-decomp.ts', import.meta.url));
const USAGE = 'npx tsx tools/sweep.ts --file sweep.json --out DIR [--jobs N]';

type Fields = Record<string, string | number | boolean>;
export type Run = { name: string; setting: string; seed: number; dir: string; fields: Fields };
type State = 'to do' | 'stopped' | 'finished' | 'failed';
/** What the table has of a run: its last evaluation. */
export type Result = Run & { state: State; metrics: Record<string, number> | undefined; msPerStep: number | undefined };

// ---- The list -------------------------------------------------------------------------------------------------------

const isRecord = (x: unknown): x is Record<string, unknown> => typeof x === 'object' && x !== null && !Array.isArray(x);

/** The runs that a sweep file asks for, setting by setting. @throws UsageError for an unknown field or a wrong type */
export function readSweep(file: string, out: string): Run[] {
  const json: unknown = orRefuse(file, () => JSON.parse(fs.readFileSync(file, 'utf8')));
  const { base = {}, seeds = [0], settings, ...others } = isRecord(json) ? json : refuse(`${file}: is no object`);
  for (const key of Object.keys(others)) refuse(`${file}: has "${key}"; takes base, seeds and settings`);
  const isSeed = (x: unknown) => Number.isInteger(x) && Number(x) >= 0;
  if (!Array.isArray(seeds) || !seeds.length || !seeds.every(isSeed) || new Set(seeds).size < seeds.length)
    return refuse(`${file}: seeds: takes a list of different whole numbers from 0`);
  if (!isRecord(settings) || !Object.keys(settings).length)
    return refuse(`${file}: settings: takes an object of named settings, {"first": {}, …}`);
  const common = fieldsOf(base, `${file}: base`);
  return Object.entries(settings).flatMap(([setting, own]) => {
    if (!/^[\w.+=-]{1,80}$/.test(setting) || /^\.*$/.test(setting))
      refuse(`${file}: the setting "${setting}": its name becomes a folder's; takes letters, digits and _ . + = -`);
    const fields = { ...common, ...fieldsOf(own, `${file}: ${setting}`) };
    return seeds.map((seed: number) => {
      const name = `${setting}-seed${seed}`;
      return { name, setting, seed, dir: path.join(out, name), fields };
    });
  });
}

/** Fields of the config, each of its default's type. */
function fieldsOf(fields: unknown, where: string): Fields {
  if (!isRecord(fields)) return refuse(`${where}: takes an object of config fields`);
  for (const [name, value] of Object.entries(fields)) {
    const standard = name === 'preset' ? '' : Object.hasOwn(DEFAULTS, name) && (DEFAULTS as Fields)[name];
    if (standard === false && !Object.hasOwn(DEFAULTS, name)) refuse(`${where}: ${name} is no field of the config`);
    if (name === 'seed' || name === 'out') refuse(`${where}: ${name} is the sweep's own: "seeds" and --out say it`);
    if (typeof value !== typeof standard) refuse(`${where}: ${name} takes a ${typeof standard}, got ${typeof value}`);
  }
  const { preset } = fields;
  if (preset !== undefined && !Object.hasOwn(PRESETS, `${preset}`))
    refuse(`${where}: preset: got ${preset}, takes one of ${Object.keys(PRESETS).join(', ')}`);
  return fields as Fields;
}

/** Fields as flags of the command line. */
export const flagsOf = (fields: Fields): string[] =>
  Object.entries(fields).flatMap(([name, value]) => {
    const flag = name.replace(/[A-Z]/g, c => `-${c.toLowerCase()}`);
    return typeof value === 'boolean' ? [`--${value ? '' : 'no-'}${flag}`] : [`--${flag}=${value}`];
  });

// ---- The runs -------------------------------------------------------------------------------------------------------

/** How far a run got. @throws UsageError if its folder is of other settings than the sweep file's now */
export async function stateOf({ dir, name, fields, seed }: Run): Promise<State> {
  const file = path.join(dir, 'config.json');
  if (!fs.existsSync(file)) return 'to do';
  const { config } = orRefuse(file, () => JSON.parse(fs.readFileSync(file, 'utf8'))) as { config: Fields };
  const { preset, ...own } = fields;
  const wanted: Fields = { ...(preset ? PRESETS[`${preset}`]!.config : {}), ...own, seed };
  const isAuto = (field: string) => wanted[field] === 0 && (DEFAULTS as Fields)[field] === 0; // the run has its own
  const same = (old: unknown, now: unknown) => old === now || (typeof now === 'string' && old === path.resolve(now));
  const was: Fields = { ...DEFAULTS, ...config }; // it may be of a version that lacked a field
  const changed = Object.keys(wanted).filter(field => !same(was[field], wanted[field]) && !isAuto(field));
  if (changed.length)
    refuse(
      `${dir}: was made with another ${changed.join(', ')}; remove it, or give the setting another name than ${name}`,
    );
  const pair = await loadPair(dir);
  return pair?.step === config.nSteps ? 'finished' : 'stopped';
}

/** Where nothing is to do: undefined. @returns the exit code of the run's process */
function startRun(run: Run, state: State, children: Set<ReturnType<typeof spawn>>): Promise<number> {
  fs.mkdirSync(run.dir, { recursive: true });
  const log = fs.openSync(path.join(run.dir, 'log.txt'), 'a');
  const how = state === 'stopped' ? ['--resume'] : [...flagsOf(run.fields), `--seed=${run.seed}`];
  const args = [...process.execArgv, NANO, 'decompose', ...how, `--out=${run.dir}`];
  const child = spawn(process.execPath, args, { stdio: ['ignore', log, log] });
  children.add(child);
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('exit', (code, signal) => {
      fs.closeSync(log);
      children.delete(child);
      resolve(code ?? 128 + (os.constants.signals[signal!] ?? 0));
    });
  });
}

/** What is known of a run: the last evaluation among its metrics, the median time of a step. */
function resultOf(run: Run, state: State): Result {
  const lines = readMetrics(path.join(run.dir, 'metrics.jsonl'));
  const times = lines.flatMap(line => line['time/ms_per_step'] ?? []).sort((a, b) => a - b);
  const metrics = lines.findLast(line => 'eval/loss/PGDReconLoss' in line);
  return { ...run, state, metrics, msPerStep: times[Math.floor(times.length / 2)] };
}

/**
 * Does what is left of the list, `jobs` at a time, and writes the table and the picture after every run.
 * @returns 0; 1 if a run failed; 128 + its number after a signal, which every run gets too and saves its state
 */
export async function sweep(runs: readonly Run[], out: string, jobs: number, say: (line: string) => void) {
  const states = new Map<Run, State>();
  for (const run of runs) states.set(run, await stateOf(run));
  const results = () => runs.map(run => resultOf(run, states.get(run)!));
  const children = new Set<ReturnType<typeof spawn>>();
  let stopped = 0;
  const onSignal = (signal: NodeJS.Signals) => {
    stopped = 128 + os.constants.signals[signal];
    for (const child of children) child.kill(signal);
  };
  process.on('SIGINT', onSignal).on('SIGTERM', onSignal);

  const waiting = runs.filter(run => states.get(run) !== 'finished');
  say(`sweep    ${runs.length} runs, ${runs.length - waiting.length} of them finished before`);
  const worker = async () => {
    for (let run = waiting.shift(); run && !stopped; run = waiting.shift()) {
      say(`${states.get(run) === 'stopped' ? 'go on' : 'start'.padEnd(5)}    ${run.name}`);
      const code = await startRun(run, states.get(run)!, children);
      states.set(run, code === 0 ? 'finished' : stopped ? 'stopped' : 'failed');
      if (code && !stopped) say(`failed   ${run.name}: exit code ${code}, see ${path.join(run.dir, 'log.txt')}`);
      writeReport(out, results());
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, jobs) }, worker));
  process.off('SIGINT', onSignal).off('SIGTERM', onSignal);
  const done = results();
  writeReport(out, done);
  return { results: done, exitCode: stopped || Number(done.some(({ state }) => state === 'failed')) };
}

// ---- The table and the picture --------------------------------------------------------------------------------------

const L0 = /^eval\/l0\/([\d.e-]+)_total$/;
/** Mean number of components with g above the lowest threshold that was evaluated. */
const l0Of = (metrics: Record<string, number>): number | undefined => {
  const keys = Object.keys(metrics).flatMap(key => L0.exec(key)?.[1] ?? []);
  keys.sort((a, b) => Number(a) - Number(b));
  return metrics[`eval/l0/${keys[0]}_total`];
};
const COLUMNS: [title: string, value: (m: Record<string, number>) => number | undefined][] = [
  ['step', m => m.step],
  ['L0', l0Of],
  ['alive', m => m['eval/alive/n_mean_ci'] ?? m['eval/n_alive']],
  ['KL ci', m => m['eval/ce_kl/kl_ci_masked']],
  ['KL stochastic', m => m['eval/ce_kl/kl_stoch_masked']],
  ['PGD', m => m['eval/loss/PGDReconLoss']],
  ['PGD, last rung', m => ladderOf(m).at(-1)?.[1]],
  ['CE + ci', m => m['eval/ce_kl/ce_difference_ci_masked']],
  ['CE + all on', m => m['eval/ce_kl/ce_difference_unmasked']],
  ['KL dead deleted', m => m['eval/ce_kl/kl_alive_mean_ci']],
];
const short = (x: number | undefined) => (x === undefined ? '-' : `${Number(x.toPrecision(3))}`);

/** A line per run in Markdown, and under settings of several finished seeds their mean. */
export function table(results: readonly Result[]): string {
  const titles = ['run', ...COLUMNS.map(([title]) => title), 'ms/step', 'state'];
  const line = (cells: string[]) => `| ${cells.join(' | ')} |`;
  const rows = results.map(({ name, metrics, msPerStep, state }) =>
    line([name, ...COLUMNS.map(([, value]) => short(metrics && value(metrics))), short(msPerStep), state]),
  );
  for (const setting of new Set(results.map(r => r.setting))) {
    const seeds = results.flatMap(r =>
      r.setting === setting && r.state === 'finished' && r.metrics ? [r.metrics] : [],
    );
    if (seeds.length < 2) continue;
    const mean = (value: (m: Record<string, number>) => number | undefined) =>
      short(seeds.reduce((total, m) => total + (value(m) ?? Number.NaN), 0) / seeds.length);
    rows.push(line([`${setting}, mean of ${seeds.length}`, ...COLUMNS.map(([, v]) => mean(v)), '', '']));
  }
  return `${[line(titles), line(titles.map((_, i) => (i ? '--:' : '---'))), ...rows].join('\n')}\n`;
}

const xml = (text: string) => text.replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);
const [WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM] = [760, 460, 64, 40, 200, 56];
const COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#999999'];

/** A logarithmic axis: from value to place, and its ticks at 1, 2, 5 times powers of ten. */
function logAxis(values: readonly number[], from: number, to: number) {
  const [low, high] = [Math.min(...values) / 1.25, Math.max(...values) * 1.25];
  const place = (x: number) => from + ((to - from) * Math.log(x / low)) / Math.log(high / low);
  const ticks: number[] = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const digit of [1, 2, 5]) ticks.push(Number(`${digit}e${power}`));
  return { place, ticks: ticks.filter(x => x >= low && x <= high) };
}

/** L0 against the fresh adversary's KL, both logarithmic: a point per run with an evaluation, a colour per setting. */
export function picture(results: readonly Result[]): string {
  const points = results.flatMap(({ name, setting, metrics }) => {
    const [l0, pgd] = [metrics && l0Of(metrics), metrics?.['eval/loss/PGDReconLoss']];
    return l0 && pgd && l0 > 0 && pgd > 0 && Number.isFinite(l0 + pgd) ? [{ name, setting, l0, pgd }] : [];
  });
  const body: string[] = [];
  const label = (x: number, y: number, text: string, more = '') =>
    body.push(`<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${more}>${xml(text)}</text>`);
  const [right, bottom] = [WIDTH - RIGHT, HEIGHT - BOTTOM];
  label(LEFT, 22, 'Active components against the adversary', 'font-size="15" font-weight="bold"');
  if (points.length) {
    const xAxis = logAxis(
      points.map(p => p.l0),
      LEFT,
      right,
    );
    const yAxis = logAxis(
      points.map(p => p.pgd),
      bottom,
      TOP,
    );
    const grid = 'stroke="#888888" stroke-opacity="0.3"';
    for (const tick of xAxis.ticks) {
      const x = xAxis.place(tick).toFixed(1);
      body.push(`<line x1="${x}" x2="${x}" y1="${TOP}" y2="${bottom}" ${grid}/>`);
      label(Number(x), bottom + 18, `${tick}`, 'text-anchor="middle"');
    }
    for (const tick of yAxis.ticks) {
      const y = yAxis.place(tick).toFixed(1);
      body.push(`<line x1="${LEFT}" x2="${right}" y1="${y}" y2="${y}" ${grid}/>`);
      label(LEFT - 8, Number(y) + 4, `${tick}`, 'text-anchor="end"');
    }
    const settings = [...new Set(points.map(p => p.setting))];
    const colour = (setting: string) => COLOURS[settings.indexOf(setting) % COLOURS.length];
    for (const { name, setting, l0, pgd } of points) {
      const at = `cx="${xAxis.place(l0).toFixed(1)}" cy="${yAxis.place(pgd).toFixed(1)}"`;
      const title = xml(`${name}: L0 ${short(l0)}, PGD ${short(pgd)}`);
      body.push(`<circle ${at} r="5" fill="${colour(setting)}" fill-opacity="0.8"><title>${title}</title></circle>`);
    }
    for (const [i, setting] of settings.entries()) {
      const y = TOP + 10 + 18 * i;
      body.push(`<rect x="${right + 16}" y="${y - 9}" width="10" height="10" fill="${colour(setting)}"/>`);
      label(right + 32, y, setting);
    }
  } else label(LEFT, TOP + 20, 'no run has been evaluated yet');
  label((LEFT + right) / 2, HEIGHT - 14, 'L0: components active at a position', 'text-anchor="middle"');
  const middle = (TOP + bottom) / 2;
  label(16, middle, 'PGD: KL in nats', `text-anchor="middle" transform="rotate(-90 16 ${middle})"`);
  const font = 'font-family="system-ui, sans-serif" font-size="12" fill="#222222"';
  const open = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" ${font}>`;
  return [open, '<rect width="100%" height="100%" fill="#ffffff"/>', ...body, '</svg>', ''].join('\n');
}

function writeReport(out: string, results: readonly Result[]): void {
  for (const [name, text] of [
    ['sweep.md', table(results)],
    ['sweep.svg', picture(results)],
  ] as const) {
    const beside = path.join(out, `${name}.tmp-${process.pid}`);
    fs.writeFileSync(beside, text);
    fs.renameSync(beside, path.join(out, name));
  }
}

/** The command line. @returns the exit code. @throws UsageError */
export async function main(args: string[]): Promise<number> {
  const string = { type: 'string' } as const;
  const options = { file: string, out: string, jobs: { ...string, default: '1' }, help: { type: 'boolean' } } as const;
  const { file, out, jobs, help } = orRefuse(USAGE, () => parseArgs({ args, options })).values;
  if (help) {
    console.log(USAGE);
    return 0;
  }
  if (!file || !out) return refuse(`takes ${USAGE}`);
  if (!/^[1-9]\d{0,2}$/.test(jobs)) refuse(`--jobs: got ${jobs}, takes a whole number from 1 to 999`);
  const runs = readSweep(file, path.resolve(out));
  fs.mkdirSync(out, { recursive: true });
  const { results, exitCode } = await sweep(runs, out, Number(jobs), line => process.stderr.write(`${line}\n`));
  console.log(`${table(results)}\n${path.join(out, 'sweep.svg')}`);
  return exitCode;
}

if (process.argv[1] && fs.realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const failed = (error: Error) => {
    const usage = error.name === 'UsageError';
    process.stderr.write(`sweep: ${usage ? error.message : error.stack}\n`);
    return usage ? 2 : 1;
  };
  process.exitCode = await main(process.argv.slice(2)).catch(failed);
}

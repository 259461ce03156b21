/**
 * postprocess --run DIR: harvest, attributions, cluster and, with an endpoint or answers, interpret and its graph pass,
 * in this order; then the page. What is there and belongs to the run's components (by their hash) is not done again.
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { cluster } from './cluster.ts';
import { FLAGS as INTERPRET_FLAGS, interpret } from './interpret.ts';
import { writePage } from './page-meanings.ts';
import * as files from './run-files.ts';

export const FLAGS = {
  ...INTERPRET_FLAGS,
  minutes: 'string', // of attributions
  alpha: 'string', // of cluster
  'cluster-positions': 'string', // its --positions
} as const;

/** The stages that live elsewhere. `page` is called last, where anything was done. */
export interface Steps {
  harvest(run: files.Run): Promise<unknown>;
  attributions?(run: files.Run, flags: files.Flags): Promise<number>;
  page?(run: files.Run): Promise<unknown>; // default: without the scoreboard of known rules, which no file has
}

const HARVESTED = 'postprocess.json'; // which components harvest.json belongs to, which it does not say itself
const hashFile = (file: string) => crypto.createHash('sha256').update(fs.readFileSync(file)).digest('hex');

/** Whether a stage's file is there and belongs to these components. */
function isOf(dir: string, name: string, components: string): boolean {
  try {
    const value = JSON.parse(fs.readFileSync(path.join(dir, name), 'utf8'));
    return value.formatVersion === 1 && value.components === components;
  } catch {
    return false;
  }
}
function isHarvested(dir: string, components: string): boolean {
  const file = path.join(dir, 'harvest.json');
  if (!fs.existsSync(file)) return false;
  if (isOf(dir, 'harvest.json', components)) return true;
  if (!isOf(dir, HARVESTED, components)) return false;
  return JSON.parse(fs.readFileSync(path.join(dir, HARVESTED), 'utf8')).harvest === hashFile(file);
}

/** Whether a file is there and no older than what it is made of, even if an earlier start ended before it was made. */
function isNewest(dir: string, name: string): boolean {
  const timeOf = (file: string) => fs.statSync(path.join(dir, file), { throwIfNoEntry: false })?.mtimeMs ?? 0;
  return timeOf(name) > 0 && SHOWN.every(file => timeOf(file) <= timeOf(name));
}
const SHOWN = ['harvest.json', 'attributions.json', 'clusters.json', 'interpretations.jsonl'];

/** @returns the exit code: that of the first stage that did not end well */
export async function postprocess(run: files.Run, flags: files.Flags, steps: Steps): Promise<number> {
  const dir = run.problem.config.out;
  const components = files.componentsHash(dir);
  const pick = (...names: string[]) => Object.fromEntries(names.map(name => [name, flags[name]]));
  const stage = async (name: string, ready: boolean, job: () => Promise<number>): Promise<number> => {
    files.talk(`${name.padEnd(13)}${ready ? 'is there' : '…'}`);
    if (ready) return 0;
    const started = performance.now();
    const code = await job();
    files.talk(`${name.padEnd(13)}${((performance.now() - started) / 1000).toFixed(1)} s`);
    return code;
  };
  const harvest = async () => {
    await steps.harvest(run);
    const record = { formatVersion: 1, components, harvest: hashFile(path.join(dir, 'harvest.json')) };
    files.writeAtomic(path.join(dir, HARVESTED), `${JSON.stringify(record)}\n`);
    return 0;
  };
  const asking = ['api-url', 'answers', 'prompts-only'].some(name => flags[name] !== undefined);
  const attributed = () => fs.existsSync(path.join(dir, 'attributions.json'));
  const { attributions } = steps;
  const stages: (() => Promise<number>)[] = [
    () => stage('harvest', isHarvested(dir, components), harvest),
    () =>
      stage('attributions', !attributions || isOf(dir, 'attributions.json', components), () =>
        attributions!(run, pick('minutes')),
      ),
    () =>
      stage('cluster', isOf(dir, 'clusters.json', components), () =>
        cluster(run, { alpha: flags.alpha, positions: flags['cluster-positions'] }),
      ),
    // asks only what has no answer yet
    ...(asking ? [() => stage('interpret', false, () => interpret(run, { ...flags, graph: attributed() }))] : []),
  ];
  for (const next of stages) {
    const code = await next();
    if (code !== 0) return code;
  }
  if (!asking)
    files.talk('interpret    left out: it takes --api-url and --api-model, or --prompts-only, or --answers FILE');
  const page = path.join(dir, 'report.html');
  await stage('page', isNewest(dir, 'report.html'), async () => {
    await (steps.page?.(run) ?? writePage(dir));
    return 0;
  });
  console.log(page);
  return 0;
}

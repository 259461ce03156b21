/**
 * Checkpoints that are only ever replaced whole, going on from the last one, and stopping at numbers that are no longer
 * finite.
 *
 * A checkpoint is a pair: components.safetensors, and the state.safetensors whose metadata names the step and the
 * SHA-256 of the components that it belongs to. Files under these names are only ever replaced by renames, and before
 * the first of the two renames the old pair has got second names (*.previous). So whenever a save is cut off, a state
 * is there beside its own components: both old, or both new.
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { openSafetensors, type TensorToWrite, writeSafetensors } from './safetensors.ts';
import { orRefuse, refuse, UsageError } from './usage-error.ts';

// ---- The pair of files ----

const PAIR = ['state', 'components'] as const; // in this order: where components are, a checkpoint is
const pairFile = (dir: string, what: (typeof PAIR)[number], which: '' | '.next' | '.previous' = '') =>
  path.join(dir, `${what}${which}.safetensors`);

interface Pair {
  step: number;
  components: string; // paths
  state: string;
  /** says so when it is not the pair last written */
  warning?: string;
}

async function readMetadata(file: string): Promise<ReadonlyMap<string, string>> {
  const { metadata, close } = await openSafetensors(file);
  close();
  return metadata;
}

/** For files, and for folders after a rename, which only then survives a power cut. (Windows has no such call.) */
function syncToDisk(fileOrFolder: string): void {
  if (process.platform === 'win32') return;
  const fd = fs.openSync(fileOrFolder, 'r');
  fs.fsyncSync(fd);
  fs.closeSync(fd);
}

function sha256(file: string): string {
  const hash = crypto.createHash('sha256');
  const piece = Buffer.alloc(2 ** 22);
  const fd = fs.openSync(file, 'r');
  try {
    for (let n = fs.readSync(fd, piece); n > 0; n = fs.readSync(fd, piece)) hash.update(piece.subarray(0, n));
  } finally {
    fs.closeSync(fd);
  }
  return hash.digest('hex');
}

/** The two files as a pair, unless one is missing or broken or the state belongs to other components. */
async function fittingPair(components: string, state: string): Promise<Pair | undefined> {
  try {
    const metadata = await readMetadata(state);
    if (metadata.get('components') !== sha256(components)) return undefined;
    return { step: Number(metadata.get('step')), components, state };
  } catch (error) {
    const { name, code } = error as NodeJS.ErrnoException;
    if (name === 'UsageError' || code === 'ENOENT') return undefined;
    throw error;
  }
}

/**
 * Saves both files as one checkpoint; the state's metadata names the step and the components. If this throws or is
 * killed, the last checkpoint can still be loaded.
 */
export async function savePair(
  dir: string,
  step: number,
  components: Iterable<TensorToWrite>,
  state: Iterable<TensorToWrite>,
): Promise<void> {
  const rename = (from: string, to: string) => {
    fs.renameSync(from, to);
    syncToDisk(dir);
  };
  const removeUnfinished = () => {
    for (const name of fs.readdirSync(dir))
      if (/^(components|state)\.(next|.*\.tmp-\d+$)/.test(name)) fs.rmSync(path.join(dir, name), { force: true });
  };
  removeUnfinished(); // of a process that was killed
  try {
    const ofComponents = { format: 'pt', step: `${step}` };
    const hash = await writeSafetensors(pairFile(dir, 'components', '.next'), components, ofComponents);
    syncToDisk(dir);
    await writeSafetensors(pairFile(dir, 'state', '.next'), state, { step: `${step}`, components: hash });
    syncToDisk(dir);
  } catch (error) {
    removeUnfinished();
    throw error;
  }
  // Two files that don't fit were left by a save cut off between the renames below: the previous pair is then the good one.
  if (await fittingPair(pairFile(dir, 'components'), pairFile(dir, 'state')))
    for (const what of PAIR) {
      const secondName = `${pairFile(dir, what, '.previous')}.tmp-${process.pid}`;
      try {
        fs.linkSync(pairFile(dir, what), secondName);
      } catch {
        fs.copyFileSync(pairFile(dir, what), secondName); // a file system without hard links
        syncToDisk(secondName);
      }
      rename(secondName, pairFile(dir, what, '.previous'));
    }
  for (const what of PAIR) rename(pairFile(dir, what, '.next'), pairFile(dir, what));
}

/** The last checkpoint that is whole; undefined before the first. @throws UsageError if none of several is whole */
export async function loadPair(dir: string): Promise<Pair | undefined> {
  const some = (['', '.previous'] as const).some(which => fs.existsSync(pairFile(dir, 'components', which)));
  if (!some) return;
  for (const stateOf of ['', '.previous'] as const)
    for (const componentsOf of ['', '.previous'] as const) {
      const files = [pairFile(dir, 'components', componentsOf), pairFile(dir, 'state', stateOf)] as const;
      const pair = await fittingPair(...files);
      if (pair && !stateOf && !componentsOf) return pair;
      if (pair) return { ...pair, warning: `${dir}: the last save was cut off; going on from step ${pair.step}` };
    }
  throw new UsageError(
    `${dir}: state.safetensors and components.safetensors are broken or not of the same save, the previous ones too`,
  );
}

// ---- Going on ----

type Variables = Readonly<Record<string, tf.Variable>>;
const toWrite = (variables: Variables): TensorToWrite[] =>
  Object.entries(variables).map(([name, variable]) => {
    return { name, shape: variable.shape, data: async () => (await variable.data()) as Float32Array };
  });

/** Saves variables as components.safetensors and state.safetensors, under their names. */
export const saveCheckpoint = (dir: string, step: number, components: Variables, state: Variables): Promise<void> =>
  savePair(dir, step, toWrite(components), toWrite(state));

/** Sets variables from a file that holds them under their names. */
export async function restore(file: string, variables: Variables): Promise<void> {
  const { tensors, readFloat32, close } = await openSafetensors(file);
  try {
    for (const [name, variable] of Object.entries(variables)) {
      const shape = tensors.get(name)?.shape;
      if (shape?.join() !== variable.shape.join()) refuse(`${file}: ${name} is [${shape}], not [${variable.shape}]`);
      tf.tidy(() => variable.assign(tf.tensor(readFloat32(name), variable.shape)));
    }
  } finally {
    close();
  }
}

/** The lines of a metrics.jsonl, without one that was cut off. */
export function readMetrics(file: string): Record<string, number>[] {
  const lines = fs.existsSync(file) ? fs.readFileSync(file, 'utf8').split('\n') : [];
  return lines.filter(line => line.endsWith('}')).map(line => orRefuse(file, () => JSON.parse(line)));
}

/**
 * Sets the variables to the last checkpoint in `dir`, and cuts metrics.jsonl to what was known then.
 * @returns its step; undefined before the first checkpoint: then from the start
 */
export async function resume(dir: string, components: Variables, state: Variables, say: (line: string) => void) {
  const checkpoint = await loadPair(dir);
  const metrics = path.join(dir, 'metrics.jsonl');
  if (!checkpoint) {
    say('resume   from the start: this run was stopped before its first checkpoint');
    fs.rmSync(metrics, { force: true });
    return;
  }
  if (checkpoint.warning) say(`warning  ${checkpoint.warning}`);
  await restore(checkpoint.components, components);
  await restore(checkpoint.state, state);
  const kept = readMetrics(metrics).filter(line => line.step! <= checkpoint.step);
  fs.writeFileSync(`${metrics}.tmp-${process.pid}`, kept.map(line => `${JSON.stringify(line)}\n`).join(''));
  fs.renameSync(`${metrics}.tmp-${process.pid}`, metrics);
  say(`resume   from step ${checkpoint.step}`);
  return checkpoint.step;
}

/**
 * What a resumed run changes: refuses by name what is neither in `free` nor in `costsBits`, and returns a warning for
 * each of the latter.
 */
export function compareConfigs(
  old: Readonly<Record<string, unknown>>,
  now: Readonly<Record<string, unknown>>,
  free: readonly string[],
  costsBits: readonly string[],
): string[] {
  const fields = [...new Set([...Object.keys(old), ...Object.keys(now)])].filter(field => !free.includes(field));
  const [was, is] = [old, now].map(config => (field: string) => JSON.stringify(config[field]));
  const changed = fields.filter(field => was!(field) !== is!(field));
  const change = (field: string) => `${field} was ${was!(field)} and is now ${is!(field)}`;
  const refused = changed.filter(field => !costsBits.includes(field)).map(change);
  if (refused.length) throw new UsageError(`--resume: ${refused.join(', ')}; start a new run for that`);
  return changed.map(field => `${change(field)}: not bit for bit the same run`);
}

/** Where a model or data came from: a path or a hub id, and the hub's commit of what was read. */
interface Origin {
  path: string;
  commit?: string | undefined;
}

/** What the two config.json say of what a run depends on. */
interface RunRecord {
  config: object;
  engine: { name: string };
  modules: object;
  model: Origin & { sha256: string };
  data: Origin & { sha256: string };
}

/** Where the hub's branch has moved since: which revision to pin. */
function pinned(flag: string, old: Origin, now: Origin): string {
  if (!old.commit || !now.commit || old.commit === now.commit) return '';
  const id = old.path.replace(/@.*$/, '');
  return `; ${id} was read at another commit than now: pin it with ${flag} ${id}@${old.commit}`;
}

// A resumed run may change what the training's numbers do not depend on. (Model and data are compared by content.)
// biome-ignore format: kept on few lines
export const MAY_CHANGE = [
  'model', 'data', 'evalData', 'labels', 'out', 'logEvery', 'saveEvery', 'harvest', 'harvestRows',
  'evalFreq', 'slowEvalFreq', 'evalBatchSize', 'ciAliveThreshold', 'roundingThreshold',
  'pgdEvalStepSize', 'pgdEvalNSteps',
];
// What changes only how numbers are rounded, or which random numbers are drawn, draws a warning.
export const CHANGES_BITS = ['engine', 'precision', 'graph', 'xla', 'threads'];

/** Refuses to resume with another config, model or data, see `compareConfigs`; says what it warns of. */
export function compareRuns(old: RunRecord, now: RunRecord, say: (line: string) => void): void {
  for (const part of ['model', 'data'] as const) {
    if (old[part].sha256 !== now[part].sha256)
      refuse(
        `--resume: ${part} is not the one of this run (${old[part].path}): its SHA-256 differs` +
          pinned(`--${part}`, old[part], now[part]),
      );
  }
  // "auto" may have been another engine then
  const fields = ({ config, engine, modules }: RunRecord) => ({ ...config, engine: engine.name, modules });
  for (const warning of compareConfigs(fields(old), fields(now), MAY_CHANGE, CHANGES_BITS)) say(`warning  ${warning}`);
}

/** Data of a run as config.json has it; older ones lack a field. */
type DataRecord = Origin & { sha256?: string | undefined; heldOutSha256?: string | undefined };

/**
 * Refuses to look at a run with other data than its own, unless other data was given on purpose: then it is said.
 * @param given whether the command line names the data (--data, --eval-data)
 * @returns what is not the run's: the training rows, the held-out rows, both, or nothing
 */
export function compareData(
  record: DataRecord,
  now: DataRecord,
  given: boolean,
  say: (line: string) => void,
): string[] {
  const differs = (field: 'sha256' | 'heldOutSha256') => record[field] && now[field] && record[field] !== now[field];
  const others = [
    ...(differs('sha256') ? ['the training rows'] : []),
    ...(differs('heldOutSha256') ? ['the held-out rows'] : []),
  ];
  if (others.length === 0) return [];
  const what = `${others.join(' and ')} are not those of this run (${record.path}): their SHA-256 differs`;
  if (given) say(`warning  ${what}; the numbers are of ${now.path}`);
  else refuse(`${what}${pinned('--data', record, now)}; other data on purpose: --data or --eval-data`);
  return others;
}

// ---- Divergence ----

/** Losses or gradients are no longer numbers. */
export class DivergenceError extends Error {
  override readonly name = 'DivergenceError';
}

/** Throws when one of a step's numbers is not finite, and names the largest parameter; they are only read then. */
export async function checkFinite(
  step: number,
  scalars: Readonly<Record<string, number>>,
  parameters: Readonly<Record<string, Pick<tf.Variable, 'data'>>>,
): Promise<void> {
  const broken = Object.entries(scalars).filter(([, value]) => !Number.isFinite(value));
  if (!broken.length) return;
  let [largest, size] = ['none', -1];
  for (const [name, parameter] of Object.entries(parameters)) {
    let most = 0;
    for (const x of await parameter.data()) most = Math.max(most, Number.isFinite(x) ? Math.abs(x) : Infinity); // NaN too
    if (most > size) [largest, size] = [name, most];
  }
  throw new DivergenceError(
    `diverged at step ${step}: ${broken.map(([name, value]) => `${name} is ${value}`).join(', ')}; the largest parameter ` +
      `is in ${largest} (${Number.isFinite(size) ? size.toPrecision(3) : 'not finite'}); the last checkpoint is untouched`,
  );
}

/** What the stages share about a run's folder: its files with their hash, flags with bounds, refusals in one line. */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import { type openRun, UsageError } from '../nano-param-decomp.ts';
import type { Harvest } from './harvest.ts';

export { type Example, type Harvest, type HarvestComponent, tokenText } from './harvest.ts';
export type { Scoreboard } from './scoreboard.ts';

/** A finished run, as openRun gives it: engine, problem, params, data. */
export type Run = Awaited<ReturnType<typeof openRun>>;

/** A stage's flags as the command line gives them. */
export type Flags = Readonly<Record<string, string | boolean | undefined>>;

/** @throws UsageError: one line without control or direction marks, since parts of it may be a stranger's text */
export function refuse(message: string): never {
  throw new UsageError(message.slice(0, 500).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '?'));
}

type Bounds = { min: number; max: number; integer?: boolean };
/** A number from a flag. @throws UsageError that says what the flag takes */
export function numberFlag(flags: Flags, name: string, otherwise: number, { min, max, integer }: Bounds): number {
  const given = flags[name];
  if (given === undefined) return otherwise;
  const value = typeof given === 'string' && given.trim() ? Number(given) : Number.NaN;
  if (value >= min && value <= max && (!integer || Number.isInteger(value))) return value;
  return refuse(`--${name}: got ${given}, takes ${integer ? 'a whole number' : 'a number'} from ${min} to ${max}`);
}
/** One of some words. @throws UsageError that lists them */
export function choiceFlag<W extends string>(flags: Flags, name: string, words: readonly [W, ...W[]]): W {
  const given = flags[name] ?? words[0];
  return words.find(word => word === given) ?? refuse(`--${name}: got ${given}, takes one of ${words.join(', ')}`);
}
/** A text from a flag; undefined where it is not given. @throws UsageError where it is empty */
export function textFlag(flags: Flags, name: string): string | undefined {
  const given = flags[name];
  if (given === undefined || (typeof given === 'string' && given !== '')) return given as string | undefined;
  return refuse(`--${name}: takes a value`);
}

/** Writes beside and renames, so that nobody ever reads half a file; makes its folder where there is none. */
export function writeAtomic(file: string, content: string | Uint8Array): void {
  fs.mkdirSync(path.dirname(file), { recursive: true });
  fs.writeFileSync(`${file}.tmp-${process.pid}`, content);
  fs.renameSync(`${file}.tmp-${process.pid}`, file);
}

/** A JSON object from the run's folder. @throws UsageError that names the command which makes the file */
export function readRunFile<X>(dir: string, name: string, command: string): X {
  const file = path.join(dir, name);
  if (!fs.existsSync(file)) refuse(`${dir}: has no ${name}; ${command} --run ${dir} makes it`);
  let value: unknown;
  try {
    value = JSON.parse(fs.readFileSync(file, 'utf8'));
  } catch (error) {
    refuse(`${file}: ${(error as Error).message}`);
  }
  const { formatVersion } = (value ?? {}) as { formatVersion?: unknown };
  if (formatVersion !== 1) refuse(`${file}: takes formatVersion 1, got ${formatVersion}; ${command} makes it anew`);
  return value as X;
}

/** harvest.json. @throws UsageError where it is missing or another format */
export const readHarvest = (dir: string): Harvest => readRunFile<Harvest>(dir, 'harvest.json', 'harvest');

/** SHA-256 of components.safetensors, by which a file says which components it belongs to. */
export function componentsHash(dir: string): string {
  const file = path.join(dir, 'components.safetensors');
  if (!fs.existsSync(file)) refuse(`${dir}: has no components.safetensors; decompose --out ${dir} makes it`);
  const hash = crypto.createHash('sha256');
  const handle = fs.openSync(file, 'r');
  try {
    const chunk = Buffer.alloc(1 << 20);
    for (let n = 1; n > 0; ) {
      n = fs.readSync(handle, chunk);
      hash.update(chunk.subarray(0, n));
    }
  } finally {
    fs.closeSync(handle);
  }
  return hash.digest('hex');
}

/** The talk, on standard error. */
export const talk = (line: string): void => void process.stderr.write(`${line}\n`);

/** A line on a terminal that is written over, at most five times a second; elsewhere nothing. */
export function liveLine(): (text: () => string) => void {
  let last = 0;
  return text => {
    if (!process.stderr.isTTY || Date.now() - last < 200) return;
    last = Date.now();
    process.stderr.write(`\r${text()}\u001b[K`);
  };
}

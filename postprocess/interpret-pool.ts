/**
 * Held-out text in which it is known where every component fires: what labels are made from, and where trials find text
 * in which a component is quiet. Computed once, then read from the run's folder (interpretations.windows.json).
 */
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, scramble, totalC } from '../nano-param-decomp.ts';
import type { LmRun } from './run.ts';
import { type Harvest, tokenText, writeAtomic } from './run-files.ts';

/** A piece of a row; `fires` are the indices in `tokens` where the component in question does. */
export type Window = { row: number; start: number; tokens: number[]; fires: number[] };
/** A piece of text with a component's importance at each token. */
export type MarkedWindow = { tokens: number[]; ci: number[] };
/** Rows in which it is known at every position which components fire. */
export interface Pool {
  rows: number[][];
  /** does it fire at this position of this row? */
  fires(module: string, index: number, row: number, position: number): boolean;
}
type Made = Pick<LmRun, 'problem' | 'params' | 'data'>;
type Named = { module: string; index: number };

export const POOL_POSITIONS = 8192; // of held-out text
const FILE = 'interpretations.windows.json';
const FORMAT = 2;

type Firing = [row: number, start: number, ci: string]; // a byte of importance for each token, base64; 255 is 1
type WindowsFile = {
  formatVersion: typeof FORMAT;
  components: string;
  harvest: string; // SHA-256 of harvest.json
  rows: number[][];
  texts: Record<number, string>;
  fires: Record<string, string>; // "module:index": bits, base64
  firings: Record<string, Firing[]>; // random windows with a firing in the middle, at most one of each window's length of text
};

/** The pool, the texts of its tokens, and of each component at most `count` random windows in which it fires. */
export async function readPool(
  job: Made,
  harvest: Harvest,
  hashes: { components: string; harvest: string },
  count: number,
) {
  const file = path.join(job.problem.config.out, FILE);
  let stored = fs.existsSync(file) ? (JSON.parse(fs.readFileSync(file, 'utf8')) as WindowsFile) : undefined;
  const { formatVersion, components, harvest: ofHarvest } = stored ?? {};
  if (formatVersion !== FORMAT || components !== hashes.components || ofHarvest !== hashes.harvest) {
    stored = await makePool(job, harvest, hashes, count);
    writeAtomic(file, `${JSON.stringify(stored)}\n`);
  }
  const { rows, fires, texts, firings } = stored!;
  const bits = new Map(Object.entries(fires).map(([name, text]) => [name, Buffer.from(text, 'base64')]));
  const S = rows[0]!.length;
  const pool: Pool = {
    rows,
    fires: (module, index, row, position) => {
      const p = row * S + position;
      return (bits.get(`${module}:${index}`)![p >> 3]! & (1 << (p & 7))) !== 0;
    },
  };
  return {
    pool,
    texts,
    firings: ({ module, index }: Named): MarkedWindow[] =>
      firings[`${module}:${index}`]!.map(([row, start, ci]) => {
        const bytes = [...Buffer.from(ci, 'base64')];
        return { tokens: rows[row]!.slice(start, start + bytes.length), ci: bytes.map(b => b / 255) };
      }),
  };
}

/** A number from 0 to 2³² that is a function of a component's column and a place. */
const draw = (column: number, place: number) => scramble(scramble(column) ^ place) >>> 0;

/** As a byte, rounded up: what fires is not 0. */
const importance = (g: number) => Math.ceil(255 * Math.min(1, Math.max(0, g)));

async function makePool({ problem, params, data }: Made, harvest: Harvest, hashes: object, most: number) {
  const { heldOut } = data;
  const { threshold, window } = harvest.settings;
  const [S, columns] = [heldOut.seqLen, totalC(problem.modules)];
  const count = Math.max(1, Math.min(heldOut.count, Math.floor(POOL_POSITIONS / S)));
  const found = harvest.components.map(({ column }) => ({
    column,
    bits: Buffer.alloc(Math.ceil((count * S) / 8)),
    firings: [] as { score: number; firing: Firing }[], // those with the largest draw so far
  }));
  for (let row = 0; row < count; row++) {
    const g = tf.tidy(() => importances(problem, params, inputBatch(heldOut, [row])).g);
    const values = await g.data(); // [S, ΣC]
    g.dispose();
    for (const { column, bits, firings } of found) {
      // of each stretch as long as a window, the firing with the largest draw
      for (let from = 0; from < S; from += window) {
        let [at, score] = [-1, -1];
        for (let s = from; s < Math.min(S, from + window); s++) {
          if (!(values[s * columns + column]! > threshold)) continue;
          const p = row * S + s;
          bits[p >> 3]! |= 1 << (p & 7);
          const drawn = draw(column, p);
          if (drawn > score) [at, score] = [s, drawn];
        }
        if (at < 0 || (firings.length === most && score <= firings.at(-1)!.score)) continue;
        const [start, end] = [Math.max(0, at - (window >> 1)), Math.min(S, at + (window >> 1) + 1)];
        const ci = Buffer.from(
          Array.from({ length: end - start }, (_, k) => importance(values[(start + k) * columns + column]!)),
        );
        firings.push({ score, firing: [row, start, ci.toString('base64')] });
        firings.sort((a, b) => b.score - a.score).splice(most);
      }
    }
  }
  const rows = Array.from({ length: count }, (_, row) => [...heldOut.row(row)]);
  const named = <X>(value: (k: number) => X) =>
    Object.fromEntries(harvest.components.map(({ module, index }, k) => [`${module}:${index}`, value(k)]));
  const file: WindowsFile = {
    formatVersion: FORMAT,
    ...(hashes as { components: string; harvest: string }),
    rows,
    texts: Object.fromEntries([...new Set(rows.flat())].map(token => [token, tokenText(data.tokenizer, token)])),
    fires: named(k => found[k]!.bits.toString('base64')),
    firings: named(k => found[k]!.firings.map(f => f.firing)),
  };
  return file;
}

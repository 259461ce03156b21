/**
 * Writes an edited model: a Hugging Face folder whose weights have components removed, scaled, or writing something else.
 *
 *   npx tsx nano-param-decomp.ts edit --run DIR --out FOLDER
 *     --remove m:i,…           W − (V_c U_c)ᵀ
 *     --scale m:i=f,…          W + (f − 1) (V_c U_c)ᵀ
 *     --write m:i=TOKEN:s      U_c becomes ±s times the token's unit row of the unembedding: + where the component's
 *                              mean activation is positive, so that it says the token where it fires
 *
 * Reports, on held-out text, the mean KL between the two models, where the components fire and elsewhere, and what
 * becomes of the written token's probability; the run keeps the report (edits/*.json) and its page shows it. The folder
 * gives the logits that `ask` gives with the same edit.
 */
import * as crypto from 'node:crypto';
import * as fs from 'node:fs';
import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import {
  importances,
  type LanguageModel,
  ownLinear,
  type T,
  type Target,
  tidyAsync,
  U,
  V,
} from '../nano-param-decomp.ts';
import { type Edit, heldOutBatches, klByPosition, parseEdits } from './ask.ts';
import type { EditFile, EditReport } from './formats.ts';
import { unembedding, withWeights } from './forward.ts';
import { refreshPage } from './parts.ts';
import type { LmRun } from './run.ts';
import { component, componentsHash, type Flags, nameOf, refuse, tokenId, tokenText, writeAtomic } from './stages.ts';

/** A component that writes a token instead of what it wrote. */
export interface Write {
  column: number;
  token: number;
  strength: number;
}

/** "m:i=TOKEN:strength" @throws UsageError */
export function parseWrite(job: LmRun, spec: string): Write {
  const [, name = '', token = '', number = ''] = /^(.*?:\d+)=(.*):([^:]+)$/s.exec(spec) ?? [];
  const strength = number.trim() ? Number(number) : Number.NaN;
  if (!(strength > 0 && strength < 1e6)) return refuse(`--write ${spec}: takes module:index=TOKEN:strength`);
  const { column, m } = component(job.problem.modules, name);
  const { path: module, dOut } = job.problem.modules[m]!;
  const { dModel } = job.problem.target.arch;
  if (dOut !== dModel || !/(^|\.)(o_proj|down_proj|c_proj|dense|dense_4h_to_h|out_proj|fc2)$/.test(module))
    return refuse(`--write: ${module} doesn't write into the residual stream; takes a component of one that does`);
  return { column, token: tokenId(job, token), strength };
}

/** Edited weights Wᵀ [dIn,dOut] by module path. */
export async function editedWeights(
  job: LmRun,
  edits: readonly Edit[],
  write?: Write,
): Promise<Map<string, tf.Tensor>> {
  const { modules, target } = job.problem;
  const sign = write ? Math.sign(await meanActivation(job, write.column)) || 1 : 1;
  const changed = new Map<string, tf.Tensor>();
  for (const m of modules) {
    const inside = <X extends { column: number }>(e: X) => e.column >= m.offset && e.column < m.offset + m.C;
    const own = edits.filter(inside);
    const writes = write && inside(write) ? write : undefined;
    if (own.length === 0 && !writes) continue;
    const weight = tf.tidy(() => {
      const rows = (columns: number[]) =>
        tf.tensor1d(
          columns.map(c => c - m.offset),
          'int32',
        );
      /** Σ_c V_c row_c [dIn,dOut] */
      const sum = (columns: number[], written: T): T =>
        tf.matMul(tf.gather(V(job.params, m), rows(columns), 1) as tf.Tensor2D, written as tf.Tensor2D);
      let W: T = target.weights.get(m.path)!;
      if (own.length > 0) {
        const factors = tf.tensor2d(own.map(e => [e.factor - 1]));
        const columns = own.map(e => e.column);
        W = tf.add(W, sum(columns, tf.mul(factors, tf.gather(U(job.params, m), rows(columns)))));
      }
      if (writes) {
        const row = tf.gather(unembedding(target), tf.tensor1d([writes.token], 'int32')); // [1,d]
        const unit = tf.div(row, tf.norm(row));
        const old = tf.gather(U(job.params, m), rows([writes.column]));
        W = tf.add(W, sum([writes.column], tf.sub(tf.mul(sign * writes.strength, unit), old)));
      }
      return W.clone();
    });
    changed.set(m.path, weight);
  }
  return changed;
}

/** Of a component over the held-out positions where it fires; over all of them where it never does. */
async function meanActivation({ problem, params, data, ...job }: LmRun, column: number): Promise<number> {
  const m = problem.modules.findLast(({ offset }) => offset <= column)!;
  const index = column - m.offset;
  const sums = [0, 0, 0];
  for (const batch of heldOutBatches({ problem, params, data, ...job })) {
    const parts = await tidyAsync(async () => {
      const { g, pass } = importances(problem, params, batch);
      const v = tf.slice(V(params, m), [0, index], [m.dIn, 1]);
      const a = tf.matMul(pass.acts[m.path] as tf.Tensor2D, v as tf.Tensor2D);
      const fires = tf.cast(tf.greater(tf.slice(g, [0, column], [g.shape[0]!, 1]), 0), 'float32');
      return tf.stack([tf.sum(tf.mul(a, fires)), tf.sum(fires), tf.sum(a)]).data();
    });
    for (const i of sums.keys()) sums[i]! += parts[i]!;
    batch.dispose();
  }
  return sums[1]! > 0 ? sums[0]! / sums[1]! : sums[2]!;
}

/** What the edit does on held-out text. */
export async function measureEdit(job: LmRun, edited: Target, columns: readonly number[], token?: number) {
  const { problem, params } = job;
  const totals = { positions: 0, firing: 0, kl: 0, klFiring: 0, before: 0, after: 0 };
  for (const batch of heldOutBatches(job)) {
    await tidyAsync(async () => {
      const { g, pass } = importances(problem, params, batch);
      const [before, after] = [pass.output, edited.forward(batch, ownLinear(edited))].map(x => x.logSoftmax()) as [
        T,
        T,
      ];
      const fires = tf.max(tf.gather(g, tf.tensor1d([...columns], 'int32'), 1), 1);
      const probability = (probs: T): T => tf.gather(probs, tf.tensor1d([token ?? 0], 'int32'), 1).flatten();
      const kl = klByPosition(before, after);
      const [f, d, p, q] = await Promise.all(
        [fires, kl, probability(before.exp()), probability(after.exp())].map(x => x.data()),
      );
      totals.positions += batch.size;
      for (let n = 0; n < batch.size; n++) {
        totals.kl += d![n]!;
        if (!(f![n]! > 0)) continue;
        totals.firing++;
        totals.klFiring += d![n]!;
        totals.before += p![n]!;
        totals.after += q![n]!;
      }
    });
    batch.dispose();
  }
  const { positions, firing } = totals;
  const mean = (sum: number, n: number) => (n > 0 ? sum / n : null);
  const report: EditReport = {
    ...{ positions, firing, kl: totals.kl / positions, klFiring: mean(totals.klFiring, firing) },
    klElsewhere: mean(totals.kl - totals.klFiring, positions - firing),
  };
  if (token === undefined) return report;
  const [before, after] = [mean(totals.before, firing), mean(totals.after, firing)];
  return { ...report, token: { id: token, text: tokenText(job, token), before, after } };
}

export const FLAGS = { remove: 'string', scale: 'string', write: 'string', json: 'boolean' } as const;

/** The command. `flags.out` is the folder to write. @returns the exit code */
export async function edit(job: LmRun, flags: Flags): Promise<number> {
  const { out } = flags;
  if (typeof out !== 'string') return refuse('edit: takes --out FOLDER, the edited model to be written');
  if (fs.existsSync(out)) return refuse(`${out}: is there already; --out takes a new folder`);
  const edits = parseEdits(job.problem.modules, `${flags.remove ?? ''}`, `${flags.scale ?? ''}`);
  const write = typeof flags.write === 'string' ? parseWrite(job, flags.write) : undefined;
  if (edits.some(e => e.column === write?.column)) return refuse('a component is edited twice');
  if (edits.length === 0 && !write) return refuse('edit: takes --remove, --scale or --write');
  const changed = await editedWeights(job, edits, write);
  await writeModel(job.problem.target, changed, out);
  const columns = [...edits, ...(write ? [write] : [])].map(e => e.column);
  const report = await measureEdit(job, withWeights(job.problem.target, changed), columns, write?.token);
  tf.dispose([...changed.values()]);
  saveReport(job, out, edits, write, report);
  if (flags.json) console.log(JSON.stringify({ folder: out, ...report }));
  else console.log(reportLines(out, report).join('\n'));
  return 0;
}

/** Keeps the report in the run's folder, one file for an edited folder, and shows it on the page. */
function saveReport(
  { problem }: LmRun,
  folder: string,
  edits: readonly Edit[],
  write: Write | undefined,
  report: EditReport,
) {
  const { modules, config } = problem;
  const file: EditFile = {
    ...{ formatVersion: 1, components: componentsHash(config.out), folder },
    edits: edits.map(({ column, factor }) => ({ ...nameOf(modules, column), factor })),
    write: write ? { ...nameOf(modules, write.column), strength: write.strength } : null,
    ...report,
  };
  const name = crypto.createHash('sha256').update(path.resolve(folder)).digest('hex').slice(0, 12);
  writeAtomic(path.join(config.out, 'edits', `${name}.json`), JSON.stringify(file));
  refreshPage(config.out, modules);
}

function reportLines(folder: string, r: EditReport): string[] {
  const number = (x: number | null) => (x === null ? 'no position' : x >= 1e-3 ? x.toFixed(4) : x.toExponential(2));
  const lines = [
    folder,
    `  fires at ${r.firing} of ${r.positions} held-out positions`,
    `  mean KL ${number(r.kl)} nats; where it fires ${number(r.klFiring)}, elsewhere ${number(r.klElsewhere)}`,
  ];
  if (!r.token) return lines;
  const { text, before, after } = r.token;
  return [
    ...lines,
    `  probability of ${JSON.stringify(text)} where it fires: ${number(before)} before, ${number(after)} after`,
  ];
}

/** The target's folder once more, with these weights: other tensors keep their bytes. */
async function writeModel(
  { dir, arch }: LanguageModel,
  changed: ReadonlyMap<string, tf.Tensor>,
  out: string,
): Promise<void> {
  const beside = `${out}.tmp-${process.pid}`;
  fs.mkdirSync(beside, { recursive: true });
  try {
    const left = new Map<string, Buffer>();
    for (const [name, weight] of changed) {
      const stored = arch.conv1d ? weight : tf.transpose(weight); // Wᵀ here, W in nn.Linear
      left.set(`${name}.weight`, Buffer.from(Float32Array.from((await stored.data()) as Float32Array).buffer));
    }
    let converted = false;
    const files = fs.readdirSync(dir, { withFileTypes: true }).filter(f => !f.isDirectory());
    for (const { name } of files) {
      if (/\.(bin|pt|pth|gguf|onnx|msgpack|h5)$/.test(name)) continue; // the same weights, unedited
      const source = path.join(dir, name);
      if (name.endsWith('.safetensors')) converted = copyTensors(source, path.join(beside, name), left) || converted;
      else fs.copyFileSync(source, path.join(beside, name));
    }
    if (left.size > 0) throw new Error(`${dir}: no tensor ${[...left.keys()].join(', ')}`);
    if (converted) {
      // float32 beside others: transformers shall not round it back
      const file = path.join(beside, 'config.json');
      const config = JSON.parse(fs.readFileSync(file, 'utf8'));
      for (const field of ['torch_dtype', 'dtype']) if (field in config) config[field] = 'float32';
      writeAtomic(file, `${JSON.stringify(config, null, 2)}\n`);
    }
    fs.renameSync(beside, out);
  } catch (error) {
    fs.rmSync(beside, { recursive: true, force: true });
    throw error;
  }
}

/** Copies a safetensors file; tensors in `edited` become float32 and are taken out of it. @returns whether one was not */
function copyTensors(source: string, to: string, edited: Map<string, Buffer>): boolean {
  type Entry = { dtype: string; shape: number[]; data_offsets: [number, number] };
  const input = fs.openSync(source, 'r');
  const output = fs.openSync(to, 'w');
  try {
    const size = Buffer.alloc(8);
    fs.readSync(input, size, 0, 8, 0);
    const length = Number(size.readBigUInt64LE());
    const text = Buffer.alloc(length);
    fs.readSync(input, text, 0, length, 8);
    const { __metadata__, ...entries }: Record<string, Entry> = JSON.parse(text.toString('utf8'));
    const header: Record<string, unknown> = __metadata__ ? { __metadata__ } : {};
    const parts: (Buffer | [from: number, bytes: number])[] = [];
    let [end, converted] = [0, false];
    const order = Object.entries(entries).sort((a, b) => a[1].data_offsets[0] - b[1].data_offsets[0]);
    for (const [name, { dtype, shape, data_offsets }] of order) {
      const [from, bytes] = [8 + length + data_offsets[0], data_offsets[1] - data_offsets[0]];
      const key = name.replace(/^transformer\./, '');
      const data = edited.get(name) ?? edited.get(key);
      if (data) converted ||= dtype !== 'F32';
      edited.delete(name) || (data && edited.delete(key));
      parts.push(data ?? [from, bytes]);
      const begin = end;
      end += data?.length ?? bytes;
      header[name] = { dtype: data ? 'F32' : dtype, shape, data_offsets: [begin, end] };
    }
    const json = Buffer.from(JSON.stringify(header));
    const padded = Buffer.concat([json, Buffer.alloc((8 - (json.length % 8)) % 8, ' ')]);
    size.writeBigUInt64LE(BigInt(padded.length));
    fs.writeSync(output, Buffer.concat([size, padded]));
    for (const part of parts) {
      if (Buffer.isBuffer(part)) {
        fs.writeSync(output, part);
        continue;
      }
      const chunk = Buffer.alloc(Math.min(part[1], 1 << 24));
      for (let done = 0; done < part[1]; ) {
        const n = fs.readSync(input, chunk, 0, Math.min(chunk.length, part[1] - done), part[0] + done);
        if (n === 0) throw new Error(`${source}: ends too early`);
        fs.writeSync(output, chunk, 0, n);
        done += n;
      }
    }
    return converted;
  } finally {
    fs.closeSync(input);
    fs.closeSync(output);
  }
}

/**
 * Components chosen by a fixed rule, not by hand, as Markdown: in each kind of module (the last word of its path) those that
 * fired are sorted by density and cut into ten parts; the most used of each part is shown. What does it fire on, what does
 * the target predict there, and what happens on held-out text when it alone is deleted?
 *
 *   npx tsx tools/show-components.ts --run DIR [--parts 10] [--positions 2048] [--engine E] [--threads N] > components.md
 *
 * It reads harvest.json. "Deleted" is its mask set to 0 while all others and the delta component stay on, so that without
 * the deletion nothing changes. The control is another component in its place: of the same kind of module, next to it in
 * density. A component that costs no more than its control where it fires is not what that place depends on.
 */
import * as path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import {
  firstRows,
  importances,
  inBatches,
  inputBatch,
  maskedForward,
  numbers,
  openRun,
  range,
  refuse,
  say,
  type T,
  tidyAsync,
  totalC,
} from '../nano-param-decomp.ts';
import type { LmRun } from '../postprocess/run.ts';
import { type Harvest, type HarvestComponent, numberFlag, readHarvest } from '../postprocess/run-files.ts';

const [TOKENS, WINDOWS, BEFORE, AFTER] = [5, 2, 7, 2];

/** A component, its rank among the tenths (1: the most used) and the one that takes its place in the control. */
export interface Chosen {
  part: number;
  parts: number;
  component: HarvestComponent;
  control: HarvestComponent | undefined;
}
export const kindOf = (module: string) => module.split('.').at(-1)!;

/** The most used component of each part, by kind of module. With fewer components than parts each is a part. */
export function choose(components: readonly HarvestComponent[], parts: number): Map<string, Chosen[]> {
  const kinds = new Map<string, HarvestComponent[]>();
  for (const c of components) kinds.set(kindOf(c.module), [...(kinds.get(kindOf(c.module)) ?? []), c]);
  const chosen = new Map<string, Chosen[]>();
  for (const [kind, list] of kinds) {
    list.sort((a, b) => b.firings - a.firings || a.column - b.column); // the most used first
    const n = Math.min(parts, list.length);
    const places = range(0, n).map(i => Math.floor((i * list.length) / n));
    const of = (at: number, i: number) => ({
      part: i + 1,
      parts: n,
      component: list[at]!,
      control: list[at + 1] ?? list[at - 1],
    });
    chosen.set(kind, places.map(of));
  }
  return chosen;
}

/** What the deletion of a component does on held-out positions. Means over no position are NaN. */
export interface Deletion {
  firing: number; // positions where its g is above 0
  klFiring: number; // mean KL(target ‖ without it) there, nats
  klLater: number; // at other positions behind a firing in the same row, which read its k and v
  klElsewhere: number; // at those left
  klControl: number; // there, with the control deleted in its place
  before: number; // mean probability of the token that it announces most, where it fires
  after: number;
}

/** Deletes each alone, on the first held-out rows. */
export async function deletions(run: LmRun, chosen: readonly Chosen[], positions: number): Promise<Deletion[]> {
  const { engine, problem, params, data } = run;
  const sumC = totalC(problem.modules);
  const { vocab } = problem.target.arch;
  const read = engine.compile('shown', ({ inputs }: Record<'inputs', T>) => {
    const { pass, g } = importances(problem, params, inputs);
    return { logProbs: pass.output.logSoftmax(), g: g.transpose() };
  });
  type Feeds = Record<'inputs' | 'logProbs' | 'mask' | 'token', T>;
  const remove = engine.compile('deleted', ({ inputs, logProbs, mask, token }: Feeds) => {
    const delta = tf.ones([1, problem.modules.length]);
    const without = maskedForward(problem, params, inputs, { mask, delta }).logSoftmax();
    const d = logProbs.sub(without);
    return {
      kl: logProbs
        .exp()
        .mul(d.add(d.neg().exp().sub(1)))
        .sum(1), // no term is negative, as in `kl`
      before: logProbs.exp().mul(token).sum(1),
      after: without.exp().mul(token).sum(1),
    };
  });
  const sums = { firing: 0, klFiring: 0, later: 0, klLater: 0, elsewhere: 0, klElsewhere: 0, klControl: 0 };
  const totals = chosen.map(() => ({ ...sums, before: 0, after: 0 }));
  const rows = firstRows(data.heldOut, Math.ceil(positions / data.heldOut.seqLen));
  for (const indices of inBatches(rows.count, problem.config.evalBatchSize)) {
    await tidyAsync(async () => {
      const inputs = inputBatch(rows, indices);
      const { logProbs, g } = await read({ inputs });
      const importance = await numbers(g!); // [ΣC,N]
      const N = importance.length / sumC;
      const without = async (column: number, id: number) => {
        const mask = tf.tensor2d(new Float32Array(sumC).fill(1).fill(0, column, column + 1), [1, sumC]);
        const token = tf.oneHot(tf.tensor1d([id], 'int32'), vocab);
        const found = await remove({ inputs, logProbs: logProbs!, mask, token });
        const [kl, before, after] = await Promise.all([found.kl, found.before, found.after].map(x => numbers(x!)));
        tf.dispose([mask, token, found]);
        return { kl: kl!, before: before!, after: after! };
      };
      for (const [i, { component, control }] of chosen.entries()) {
        const t = totals[i]!;
        const own = await without(component.column, component.output.top[0]?.[0] ?? 0);
        const other = control && (await without(control.column, 0));
        let behind = false;
        for (let n = 0; n < N; n++) {
          if (n % rows.seqLen === 0) behind = false;
          if (!(importance[component.column * N + n]! > 0)) {
            t[behind ? 'later' : 'elsewhere']++;
            t[behind ? 'klLater' : 'klElsewhere'] += own.kl[n]!;
            continue;
          }
          behind = true;
          t.firing++;
          t.klFiring += own.kl[n]!;
          t.klControl += other?.kl[n] ?? Number.NaN;
          t.before += own.before[n]!;
          t.after += own.after[n]!;
        }
      }
    });
  }
  return totals.map(t => ({
    firing: t.firing,
    klFiring: t.klFiring / t.firing,
    klLater: t.klLater / t.later,
    klElsewhere: t.klElsewhere / t.elsewhere,
    klControl: t.klControl / t.firing,
    before: t.before / t.firing,
    after: t.after / t.firing,
  }));
}

/** Text as a code span in a cell of a Markdown table, with what can't be seen made visible. */
export function code(text: string): string {
  const visible = text
    .replaceAll('\n', '↵')
    .replaceAll('\t', '⇥')
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '·');
  const fence = '`'.repeat(Math.max(0, ...[...visible.matchAll(/`+/g)].map(([run]) => run.length)) + 1);
  const space = /^`|`$|^ .* $/.test(visible) ? ' ' : '';
  return visible ? `${fence}${space}${visible.replaceAll('|', '\\|')}${space}${fence}` : '∅';
}
const short = (x: number) =>
  Number.isNaN(x) ? '–' : x === 0 || Math.abs(x) >= 1e-3 ? `${Number(x.toPrecision(2))}` : x.toExponential(0);
const percent = (x: number) => `${Number((100 * x).toPrecision(2))} %`;

/** The report: a table for each kind of module, and what can't be read off it. */
export function report(
  harvest: Harvest,
  kinds: ReadonlyMap<string, readonly Chosen[]>,
  found: ReadonlyMap<Chosen, Deletion>,
): string {
  const text = (id: number) => harvest.vocabulary[id] ?? `#${id}`;
  const between = Object.values(harvest.vocabulary).some(t => t.startsWith(' ')) ? '' : ' '; // a tokenizer of words
  const windowOf = ({ tokens, at }: HarvestComponent['examples']['top'][number]) => {
    const part = (from: number, to: number) => tokens.slice(Math.max(0, from), to).map(text).join(between);
    const around = [part(at - BEFORE, at), `»${part(at, at + 1)}«`, part(at + 1, at + 1 + AFTER)];
    return code(around.filter(Boolean).join(between));
  };
  const list = (stats: HarvestComponent['input']['top']) =>
    stats
      .slice(0, TOKENS)
      .map(([id]) => code(text(id)))
      .join(' ');
  const titles = [
    '',
    'component',
    'density',
    'fires on',
    'most strongly at',
    'the target then says',
    'KL deleted: where it fires',
    'later',
    'elsewhere',
    'control',
    'its first word',
  ];
  const row = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const lines = [...kinds].flatMap(([kind, chosen]) => [
    `\n### ${kind}\n`,
    row(titles),
    row(titles.map(() => '---')),
    ...chosen.map(c => {
      const { component, part, parts } = c;
      const d = found.get(c)!;
      return row([
        `${part}/${parts}`,
        `\`${component.module}:${component.index}\``,
        `${percent(component.density)}${component.lowCount ? ' (few)' : ''}`,
        list(component.input.top) || '–',
        component.examples.top.slice(0, WINDOWS).map(windowOf).join('<br>'),
        list(component.output.top) || '–',
        short(d.klFiring),
        short(d.klLater),
        short(d.klElsewhere),
        short(d.klControl),
        component.output.top.length > 0 && d.firing > 0 ? `${short(d.before)} → ${short(d.after)}` : '–',
      ]);
    }),
  ]);
  const all = [...found];
  const count = (which: (d: Deletion, c: Chosen) => boolean) => all.filter(([c, d]) => which(d, c)).length;
  const unread = [
    [
      count((_, c) => c.component.lowCount),
      `fired fewer than ${harvest.settings.lowCount} times in the harvest: their lists are noise ("few")`,
    ],
    [count(d => d.firing === 0), 'fire at none of the held-out positions'],
    [
      count((_, c) => c.component.input.top.length + c.component.output.top.length === 0),
      'prefer no token, neither at their place nor after it',
    ],
    [
      count(d => d.klFiring < 0.01),
      'change the answer by less than 0.01 nats where they fire when they alone are deleted',
    ],
    [count(d => d.klFiring <= d.klControl), 'cost no more there than their control'],
    [count(d => d.klFiring < 10 * d.klElsewhere), 'cost less than ten times as much where they fire as elsewhere'],
  ].filter(([n]) => Number(n) > 0);
  return [
    `The most used component of each part by density, in each kind of module: ${all.length} of ${harvest.components.length} that fired on ${harvest.positions.toLocaleString('en')} training positions.`,
    'Lists: the tokens met more often than chance, by PMI. KL in nats: "later", at other positions behind a firing in its row, where its k and v are read; "elsewhere", at all that are left; "control", where it fires, with another component of like density deleted in its place. "Its first word": mean probability of the first of what "the target then says", where it fires, before and after.',
    ...lines,
    `\nWhat can't be read: of these ${all.length}`,
    ...unread.map(([n, what]) => `- ${n} ${what}`),
  ].join('\n');
}

async function main(argv: string[]): Promise<void> {
  const flag = { type: 'string' } as const;
  const { values } = parseArgs({
    args: argv,
    options: { run: flag, parts: flag, positions: flag, engine: flag, threads: flag },
  });
  const dir = values.run ?? refuse('show-components: takes --run DIR, the folder of a finished run with a harvest');
  const parts = numberFlag(values, 'parts', 10, { min: 1, max: 1000, integer: true });
  const positions = numberFlag(values, 'positions', 2048, { min: 1, max: 1e9, integer: true });
  const harvest = readHarvest(dir);
  if (harvest.inputs) refuse(`${dir}: is not of a language model`);
  const threads = numberFlag(values, 'threads', 0, { min: 0, max: 1024, integer: true });
  const run = await openRun(dir, { threads, ...(values.engine && { engine: values.engine }) });
  const kinds = choose(harvest.components, parts);
  const chosen = [...kinds.values()].flat();
  say(`deleting ${chosen.length} components, each alone, and as many controls`);
  const all = await deletions(run, chosen, positions);
  console.log(report(harvest, kinds, new Map(chosen.map((c, i) => [c, all[i]!]))));
}

if (process.argv[1] && path.resolve(process.argv[1]) === fileURLToPath(import.meta.url))
  main(process.argv.slice(2)).catch((error: NodeJS.ErrnoException) => {
    const usage = error.name === 'UsageError' || `${error.code}`.startsWith('ERR_PARSE_ARGS');
    say(usage ? `show-components: ${error.message}` : `${error.stack}`);
    process.exitCode = usage ? 2 : 1;
  });

/**
 * Marks prompt graphs by the toy's known rules: do they reach back to the tokens that the grammar makes responsible?
 *
 *   npx tsx tools/graph-rules.ts RUN … [--positions 6] [--controls 3]
 *
 * For each rule its best component (of the scoreboard), at positions where the rule is in force and the component has
 * an importance above 0.1: is a responsible token among the three input tokens that most of the component's influence
 * comes from, through the graph? The control is the same question about random components of the same density, at the
 * same positions. A row a rule, then the mean over rules, and the same over the rules whose responsible token is an
 * earlier one: a component's own position is easily among the three. The last line is one JSON object.
 */
import * as fs from 'node:fs';
import { parseArgs } from 'node:util';
import * as tf from '@tensorflow/tfjs';
import { importances, inputBatch, openRun, totalC, uniformArray } from '../nano-param-decomp.ts';
import { promptGraph } from '../postprocess/graph.ts';
import { type Labels, scoreRules } from '../postprocess/scoreboard.ts';
import { tokenText } from '../postprocess/stages.ts';
import { influences } from '../postprocess/viewer.ts';

/** The positions that a rule's knowledge comes from, given the words up to t (method: make-toy.ts, the grammar). */
function responsible(rule: string, words: string[], t: number): number[] {
  const [kind = '', what = ''] = rule.split(':');
  const of = (wanted: (word: string) => boolean) => words.slice(0, t + 1).flatMap((w, s) => (wanted(w) ? [s] : []));
  const person = words[1]!;
  if (kind === 'name') return of(w => w === what);
  if (kind === 'gender' || kind === 'then-gender') return of(w => w === person || w === what);
  if (kind === 'focus') return of(w => w === what);
  if (kind === 'colour') return [t]; // the colour itself
  if (kind === 'sound') return [t - 2]; // the cow | says "
  if (kind === 'agree') return [t - 3]; // the dogs | in the barn
  if (kind === 'the') return [t - 1]; // . the, liked the, in the
  if (rule === 'quote:close') return [t - 1]; // " moo
  if (rule === 'quote:after') return [t - 2]; // " moo "
  return [t - 1]; // says ", said "
}

const { positionals: runs, values } = parseArgs({
  allowPositionals: true,
  options: { positions: { type: 'string', default: '6' }, controls: { type: 'string', default: '3' } },
});
const [perRule, controls] = [Number(values.positions), Number(values.controls)];
const STRONGEST = 3;

async function mark(dir: string) {
  const job = await openRun(dir, { harvest: false });
  const { problem, params, data } = job;
  const { rules, labels }: Labels = JSON.parse(fs.readFileSync(problem.config.labels, 'utf8'));
  const board = await scoreRules(job, { rules, labels });
  const sumC = totalC(problem.modules);
  const S = data.heldOut.seqLen;
  const all = Array.from({ length: labels.length }, (_, i) => i);
  const g = tf.tidy(() => importances(problem, params, inputBatch(data.heldOut, all)).g.dataSync() as Float32Array);
  const firings = new Float64Array(sumC);
  for (let i = 0; i < g.length; i++) firings[i % sumC]! += Number(g[i]! > 0.1);

  /** Per rule: its component's column, random ones of the same density, and some positions. */
  const plans = board.rules.map((rule, r) => {
    const m = problem.modules.find(({ path }) => path === rule.component.module)!;
    const column = m.offset + rule.component.index;
    const distance = (c: number) => Math.abs(Math.log(firings[c]! / firings[column]!));
    const near = [...firings.keys()]
      .filter(c => c !== column && firings[c]! > 0)
      .sort((a, b) => distance(a) - distance(b));
    const draws = uniformArray(10, r, 0, 1);
    const random = near.slice(0, 10).sort((a, b) => draws[near.indexOf(a)]! - draws[near.indexOf(b)]!);
    const places = labels.flatMap((row, i) =>
      row.flatMap((inForce, t) =>
        inForce.includes(r) && g[(i * S + t) * sumC + column]! > 0.1 ? [{ row: i, t }] : [],
      ),
    );
    // spread over the rows
    const step = Math.max(1, Math.floor(places.length / perRule));
    const positions = places.filter((_, k) => k % step === 0).slice(0, perRule);
    return { name: rule.name, column, random: random.slice(0, controls), positions, found: 0, control: 0, asked: 0 };
  });
  const rows = [...new Set(plans.flatMap(p => p.positions.map(x => x.row)))].sort((a, b) => a - b);
  for (const [k, row] of rows.entries()) {
    const mine = plans.flatMap(plan => plan.positions.filter(x => x.row === row).map(({ t }) => ({ plan, t })));
    const tokens = [...data.heldOut.row(row)];
    const words = tokens.map(id => tokenText(job, id));
    const also = mine.flatMap(({ plan, t }) => [plan.column, ...plan.random].map(column => ({ position: t, column })));
    const graph = await promptGraph(job, tokens, { incoming: 1000, outputThreshold: 1 }, also);
    for (const { plan, t } of mine) {
      const right = responsible(plan.name, words, t);
      const reaches = (column: number): number => {
        const m = problem.modules.findLast(({ offset }) => offset <= column)!;
        const node = graph.nodes.find(
          n => 'module' in n && n.position === t && n.module === m.path && n.index === column - m.offset,
        )!;
        const influence = influences(graph, [[node.id, 1]]).subarray(0, tokens.length); // embeddings come first
        const order = [...influence.keys()]
          .filter(s => influence[s]! > 0)
          .sort((a, b) => influence[b]! - influence[a]!);
        return Number(order.slice(0, STRONGEST).some(s => right.includes(s)));
      };
      plan.asked++;
      plan.found += reaches(plan.column);
      plan.control += plan.random.reduce((sum, c) => sum + reaches(c), 0) / plan.random.length;
    }
    process.stderr.write(`${dir}: row ${k + 1} of ${rows.length}\n`);
  }
  const scored = plans.filter(p => p.asked > 0);
  const mean = (list: number[]) => list.reduce((sum, x) => sum + x, 0) / list.length;
  const summary = (list: typeof plans) => {
    const [found, control] = [mean(list.map(p => p.found / p.asked)), mean(list.map(p => p.control / p.asked))];
    return { rules: list.length, found, control, factor: found / control };
  };
  for (const p of scored)
    console.log(
      `${p.name.padEnd(18)} found ${(p.found / p.asked).toFixed(2)}  control ${(p.control / p.asked).toFixed(2)}`,
    );
  const result = { run: dir, all: summary(scored), earlier: summary(scored.filter(p => !p.name.startsWith('colour'))) };
  for (const part of ['all', 'earlier'] as const) {
    const { found, control, factor } = result[part];
    console.log(`${part}: found ${found.toFixed(3)}, control ${control.toFixed(3)}, factor ${factor.toFixed(2)}`);
  }
  return result;
}

const results = [];
for (const dir of runs) results.push(await mark(dir));
console.log(JSON.stringify(results));

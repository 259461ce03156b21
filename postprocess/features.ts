/**
 * The harvest of a network that reads features and not tokens: the same Harvest, in which features take the place of
 * tokens. Inputs are named x0 x1 …, outputs y0 y1 …. What counts how often a token was there is Σ|x| here, so that PMI
 * says how much more of a feature is there than by chance when the component fires. An example is one input, as the
 * features that are not 0 in it. All counts are dense products: for networks of a few thousand components.
 */
import * as tf from '@tensorflow/tfjs';
import {
  importances,
  inBatches,
  indicator,
  inputBatch,
  matmul,
  mse,
  numbers,
  type Rows,
  type Run,
  range,
  refuse,
  scramble,
  totalC,
  U,
  V,
} from '../nano-param-decomp.ts';
import {
  type Example,
  type Harvest,
  type HarvestComponent,
  harvestDefaults,
  type Partner,
  type TokenStat,
} from './harvest.ts';

const MAX_COMPONENTS = 8192; // the table of pairs has the square of it

export async function harvestFeatures({ problem, params }: Run, rows: Rows): Promise<Harvest> {
  const { target, modules, config } = problem;
  const settings = { ...harvestDefaults, seed: config.seed };
  const columns = totalC(modules);
  if (columns > MAX_COMPONENTS)
    refuse(`harvest: ${columns} components, takes at most ${MAX_COMPONENTS} without tokens`);
  if (!Number.isFinite(rows.count)) refuse('--harvest-rows: 0 is all rows, and this source has no end');
  const { seqLen } = rows;
  const N = rows.count * seqLen;

  // Sums over the positions, and the best positions of each component.
  const names: Record<number, string> = {};
  const sums: Record<string, Float64Array> = {};
  const add = (name: string, values: Float32Array) => {
    sums[name] ??= new Float64Array(values.length);
    for (const [i, x] of values.entries()) sums[name][i]! += x;
  };
  type Scored = { score: number; row: number; position: number; ci: number; activation: number; input: number[] };
  const lists = range(0, columns).map(() => ({ top: [] as Scored[], random: [] as Scored[] }));
  const keep = (list: Scored[], candidate: Scored) => {
    if (list.length === settings.examples && candidate.score <= list.at(-1)!.score) return;
    list.push(candidate);
    list.sort((a, b) => b.score - a.score).splice(settings.examples);
  };
  for (const indices of inBatches(rows.count, 512)) {
    const inputs = inputBatch(rows, indices);
    const out = tf.tidy(() => {
      const { pass, g, N } = importances(problem, params, inputs);
      const fires = indicator(g.greater(settings.threshold));
      const parts = modules.map(m => matmul(pass.acts[m.path]!, V(params, m)).mul(U(params, m).square().sum(1).sqrt()));
      const activation = tf.concat(parts, 1);
      const x = inputs.reshape([N, -1]).abs();
      const answers = target.compare === mse ? pass.output.abs() : pass.output.softmax();
      const perAnswer = N / answers.shape[0]!; // one answer may stand for a whole row
      const y = answers.reshape([-1, 1, answers.shape[1]!]).tile([1, perAnswer, 1]).reshape([N, -1]);
      const perFiring = { input: tf.matMul(fires, x, true), output: tf.matMul(fires, y, true) };
      const of = { x: x.sum(0), y: y.sum(0), fires: fires.sum(0), ci: g.sum(0), driven: activation.mul(fires).sum(0) };
      return { ...perFiring, ...of, together: tf.matMul(fires, fires, true), g, activation };
    });
    const { g, activation, ...summed } = out;
    for (const [name, t] of Object.entries(summed)) add(name, await numbers(t));
    const [ci, driven] = await Promise.all([numbers(g), numbers(activation)]);
    tf.dispose([inputs, out]);
    for (const [b, row] of indices.entries()) {
      const values = rows.row(row);
      for (const position of range(0, seqLen)) {
        const n = b * seqLen + position;
        for (const c of range(0, columns)) {
          const [strength, a] = [ci[n * columns + c]!, driven[n * columns + c]!];
          if (strength <= settings.threshold) continue;
          const width = values.length / seqLen;
          const input = Array.from(values.slice(position * width, (position + 1) * width));
          const found = { row, position, ci: strength, activation: a, input };
          keep(lists[c]!.top, { ...found, score: strength + 1e-9 * Math.abs(a) });
          keep(lists[c]!.random, { ...found, score: scramble(scramble(row * seqLen + position) ^ c) });
        }
      }
    }
  }

  const [F, O] = [sums.x!.length, sums.y!.length];
  for (const f of range(0, F)) names[f] = `x${f}`;
  for (const o of range(0, O)) names[F + o] = `y${o}`;
  const idOf = new Map(Object.entries(names).map(([id, text]) => [text, Number(id)]));
  const named = (text: string) => {
    if (!idOf.has(text)) names[idOf.size] = text;
    if (!idOf.has(text)) idOf.set(text, idOf.size);
    return idOf.get(text)!;
  };
  const example = ({ row, position, ci, activation, input }: Scored): Example => {
    const present = range(0, F)
      .filter(f => input[f] !== 0)
      .sort((a, b) => Math.abs(input[b]!) - Math.abs(input[a]!))
      .slice(0, settings.window);
    const tokens = present.map(f => named(`x${f}=${input[f]!.toFixed(2)} `));
    if (tokens.length === 0) tokens.push(named('nothing '));
    return { row, start: position, at: 0, tokens, ci: tokens.map(() => ci), activation: tokens.map(() => activation) };
  };
  const fired = (c: number) => sums.fires![c]!;
  const statsOf = (c: number, counts: Float64Array, totals: Float64Array, first: number) => {
    const width = totals.length;
    const all = range(0, width).flatMap((f): TokenStat[] => {
      const [count, expected] = [counts[c * width + f]!, (fired(c) * totals[f]!) / N];
      const pmi = Math.log(count / expected);
      if (Math.max(count, expected) < settings.minCount || Math.abs(pmi) < 1e-4) return [];
      return [[first + f, count, count > 0 ? pmi : null]];
    });
    all.sort((a, b) => (b[2] ?? -Infinity) - (a[2] ?? -Infinity));
    const top = all.filter(([, , pmi]) => (pmi ?? -1) > 0).slice(0, settings.listLength);
    const bottom = all
      .filter(([, , pmi]) => (pmi ?? -1) < 0)
      .reverse()
      .slice(0, settings.listLength);
    return { top, bottom };
  };
  const partnersOf = (c: number) => {
    const pairs = range(0, columns).flatMap((other): Partner[] => {
      const together = sums.together![c * columns + other]!;
      if (other === c || together === 0) return [];
      const jaccard = together / (fired(c) + fired(other) - together);
      return [[other, together, jaccard, Math.log((together * N) / (fired(c) * fired(other)))]];
    });
    const best = (list: Partner[], by: 2 | 3) => [...list].sort((a, b) => b[by] - a[by]).slice(0, settings.partners);
    return {
      jaccard: best(pairs, 2),
      pmi: best(
        pairs.filter(([, n]) => n >= settings.minTogether),
        3,
      ),
    };
  };
  const components = modules.flatMap(m =>
    range(0, m.C).flatMap((index): HarvestComponent[] => {
      const column = m.offset + index;
      const firings = fired(column);
      if (firings === 0) return [];
      return [
        {
          ...{ module: m.path, index, column, firings, density: firings / N, meanCi: sums.ci![column]! / N },
          ...{ meanActivation: sums.driven![column]! / firings, lowCount: firings < settings.lowCount },
          examples: { top: lists[column]!.top.map(example), random: lists[column]!.random.map(example) },
          input: { ...statsOf(column, sums.input!, sums.x!, 0), missed: 0 },
          output: statsOf(column, sums.output!, sums.y!, F),
          partners: partnersOf(column),
        },
      ];
    }),
  );
  return {
    formatVersion: 1,
    inputs: 'features',
    positions: N,
    pairPositions: N,
    outputTokens: O,
    settings,
    modules: modules.map(({ path, offset, C }) => ({
      ...{ path, offset, C },
      alive: components.filter(c => c.module === path).length,
      meanCi: Array.from(sums.ci!.subarray(offset, offset + C), total => total / N),
    })),
    components,
    passages: [],
    vocabulary: names,
  };
}

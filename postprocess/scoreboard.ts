import * as tf from '@tensorflow/tfjs';
import { readObject } from '../io/stand-in.ts';
import {
  importances,
  indicator,
  inputBatch,
  maskedForward,
  numbers,
  ownLinear,
  type Rows,
  type Run,
  range,
  refuse,
  sum,
  type T,
  totalC,
} from '../nano-param-decomp.ts';

// The mechanism scoreboard: how well do components answer to rules that the data is known to follow?

/** A rule that the data is known to follow, with the component that answers to it best. */
export interface RuleScore {
  name: string;
  description?: string;
  /** positions at which the rule is in force */
  support: number;
  component: { module: string; index: number };
  precision: number;
  recall: number;
  f1: number;
  /** mean KL without that component where the rule is in force, and elsewhere */
  klInForce: number;
  klElsewhere: number;
  causal: boolean;
}
export interface Scoreboard {
  rules: RuleScore[];
  meanF1: number;
  nF1AtLeast80: number;
  nCausal: number;
}
/** The file of --labels: by row and position, the rules in force when the next token is predicted. */
export interface Labels {
  rules: { name: string; description?: string }[];
  labels: number[][][];
}
/** A component answers to a rule where its importance is above this. */
const ANSWERS_ABOVE = 0.1;

/**
 * The mechanism scoreboard: for each rule the component whose "g > 0.1" has the best F1 for "the rule is in force"
 * (of those within 0.01 of it, the one whose deletion costs most there). It is called causal if deleting that one
 * component from the full model (all others and all deltas on) costs more than 0.1 nats where the rule is in force, and
 * less than a tenth of that elsewhere.
 */
export async function scoreRules({ engine, problem, params, data }: Run, { rules, labels }: Labels) {
  const { target, modules } = problem;
  const sumC = totalC(modules);
  const answers = engine.compile('answers', ({ tokens }: Record<'tokens', T>) => ({
    active: indicator(tf.greater(importances(problem, params, tokens).g, ANSWERS_ABOVE)),
  }));
  const without = engine.compile('without', ({ tokens, mask }: Record<'tokens' | 'mask', T>) => {
    const logProbs = target.forward(tokens, ownLinear(target)).logSoftmax();
    const masks = { mask, delta: tf.ones([1, modules.length]) };
    const logits = maskedForward(problem, params, tokens, masks);
    return { kl: tf.sum(tf.mul(tf.exp(logProbs), tf.sub(logProbs, tf.logSoftmax(logits))), 1) };
  });
  const tokens = inputBatch(data.heldOut, range(0, labels.length));
  const active = await numbers((await answers({ tokens })).active); // [N, ΣC]
  const inForce = labels.flat();
  const [firings, support] = [new Float64Array(sumC), new Float64Array(rules.length)];
  const both = rules.map(() => new Float64Array(sumC));
  for (const [n, ruleIds] of inForce.entries()) {
    for (const r of ruleIds) support[r]!++;
    for (let c = 0; c < sumC; c++) {
      if (!active[n * sumC + c]) continue;
      firings[c]!++;
      for (const r of ruleIds) both[r]![c]!++;
    }
  }
  const scores: RuleScore[] = [];
  for (const [r, rule] of rules.entries()) {
    const f1 = (c: number) => (2 * both[r]![c]!) / Math.max(1, firings[c]! + support[r]!);
    const ranked = range(0, sumC).sort((a, b) => f1(b) - f1(a));
    // a mechanism often has a component in several layers: among equally good ones, the one that matters most
    const equals = ranked.slice(0, 4).filter(c => f1(c) > f1(ranked[0]!) - 0.01);
    const deletions = await Promise.all(
      equals.map(async c => {
        const mask = tf.tensor2d(
          Float32Array.from({ length: sumC }, (_, i) => Number(i !== c)),
          [1, sumC],
        );
        const kl = await numbers((await without({ tokens, mask })).kl);
        const mean = (wanted: boolean) => {
          const chosen = kl.filter((_, n) => inForce[n]!.includes(r) === wanted);
          return sum(chosen) / Math.max(1, chosen.length);
        };
        return { c, klInForce: mean(true), klElsewhere: mean(false) };
      }),
    );
    const { c, klInForce, klElsewhere } = deletions.sort((a, b) => b.klInForce - a.klInForce)[0]!;
    const m = modules.find(({ offset, C }) => c < offset + C)!;
    scores.push({
      ...rule,
      support: support[r]!,
      component: { module: m.path, index: c - m.offset },
      f1: f1(c),
      precision: both[r]![c]! / Math.max(1, firings[c]!),
      recall: both[r]![c]! / Math.max(1, support[r]!),
      klInForce,
      klElsewhere,
      causal: klInForce > 0.1 && klElsewhere < klInForce / 10,
    });
  }
  const meanF1 = sum(scores.map(s => s.f1)) / scores.length;
  const count = (wanted: (s: RuleScore) => boolean) => scores.filter(wanted).length;
  return { rules: scores, meanF1, nF1AtLeast80: count(s => s.f1 >= 0.8), nCausal: count(s => s.causal) };
}

/** --labels: the rules in force in the first rows of the held-out data. */
export function readLabels(file: string, rows: Rows): Labels {
  const { rules, labels } = readObject(file) as unknown as Labels;
  const row = (r: unknown) =>
    Array.isArray(r) && r.length === rows.seqLen && r.flat().every(id => rules[id] !== undefined);
  if (Array.isArray(rules) && Array.isArray(labels) && labels.length <= rows.count && labels.every(row))
    return { rules, labels };
  return refuse(
    `${file}: takes {"rules": [{"name"}…], "labels": [row][position][rule ids]} for the rows of --eval-data`,
  );
}

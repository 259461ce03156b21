import { ladderOf, worstModule } from './measures.ts';
import type { Scoreboard } from './scoreboard.ts';

// What people see of a run on standard output.

const number = (x: number) => (Math.abs(x) >= 1e-3 ? x.toFixed(4) : x.toExponential(2)).padStart(10);

/** The final numbers of a run. */
export function summary(
  metrics: Readonly<Record<string, number>>,
  sizes: { components: number; pgdSteps: number },
): string {
  const value = (name: string) => metrics[`eval/${name}`]!;
  const strategies = {
    unmasked: 'everything on',
    ci_masked: 'CI masks',
    rounded_masked: 'rounded CI masks',
    stoch_masked: 'stochastic masks',
    random_masked: 'random masks',
    zero_masked: 'nothing on',
  };
  // A network that predicts no next token has no cross-entropy, and one of numbers is compared by squared errors.
  const hasCe = 'eval/ce_kl/ce_target' in metrics;
  const compared = 'eval/recon/mse_ci_masked' in metrics ? 'recon/mse' : 'ce_kl/kl';
  const line = (name: string, label: string) => {
    const ce = hasCe ? number(value('ce_kl/ce_target') + value(`ce_kl/ce_difference_${name}`)) : ''.padEnd(10);
    return `  ${label.padEnd(18)}${ce}${number(value(`${compared}_${name}`))}`;
  };
  const l0 = (t: string) => metrics[`eval/l0/${t}_total`];
  const l0s = Object.keys(metrics).flatMap(name => /^eval\/l0\/([\d.e-]+)_total$/.exec(name)?.[1] ?? []);
  const [lowest = '', ...higher] = l0s.sort((a, b) => +a - +b);
  const more = measureLines(metrics, compared, sizes.pgdSteps);
  const nats = `        KL   (nats per ${hasCe ? 'token' : 'answer'}, held-out rows)`;
  const units = compared === 'ce_kl/kl' ? nats : '       MSE   (mean squared error, held-out rows)';
  const lines = [
    `\n${''.padEnd(20)}${hasCe ? '        CE' : ''.padEnd(10)}${units}`,
    ...(hasCe ? [`  ${'the target'.padEnd(18)}${number(value('ce_kl/ce_target'))}`] : []),
    ...Object.entries(strategies).map(([name, label]) => line(name, label)),
    ...more.deleted,
    ...more.ladder,
    `  faithfulness ${value('loss/FaithfulnessLoss').toExponential(2)}${more.worst}`,
    `  L0 ${l0(lowest)!.toFixed(2)}${higher.map(t => `, ${l0(t)!.toFixed(2)} above ${t}`).join('')}`,
    `  ${more.alive} alive of ${sizes.components} components`,
    ...more.range,
  ];
  return lines.join('\n');
}

/** Lines of the measures beside the original's; without them the evaluation's own. */
function measureLines(metrics: Readonly<Record<string, number>>, compared: string, pgdSteps: number) {
  const value = (name: string) => metrics[`eval/${name}`]!;
  const rung = (steps: number, loss: number) => `  ${`fresh PGD, ${steps} steps`.padEnd(28)}${number(loss)}`;
  const ladder = ladderOf(metrics).filter(([steps]) => steps > 0);
  if (!('eval/alive/positions' in metrics)) {
    const alone = [rung(pgdSteps, value('loss/PGDReconLoss'))];
    return { deleted: [], ladder: alone, worst: '', alive: `${value('n_alive')}`, range: [] };
  }
  const positions = `${value('alive/positions').toLocaleString('en')} positions`;
  const flat = metrics['eval/pgd/flat_from'];
  const verdict = flat === undefined ? '   still rising' : `   flat from ${flat} steps on`;
  const worst = worstModule(metrics)!;
  const ones = value('g_bins/1_total') / Math.max(value('l0/0.0_total'), 1e-9);
  return {
    deleted: [`  ${'dead ones deleted'.padEnd(28)}${number(value(`${compared}_alive_mean_ci`))}   (by ${positions})`],
    ladder:
      ladder.length > 0
        ? ladder.map(([steps, loss], i) => rung(steps, loss) + (i === ladder.length - 1 ? verdict : ''))
        : [rung(pgdSteps, value('loss/PGDReconLoss'))],
    worst: `; of ‖W‖² at most ${worst.ratio.toExponential(2)}, in ${worst.module}`,
    alive: `${value('alive/n_mean_ci')} (${value('alive/n_ever')} ever fire)`,
    range: [
      `  z from ${value('z/min/total').toFixed(1)} to ${value('z/max/total').toFixed(1)}; ${(100 * ones).toFixed(0)} % of the active importances are exactly 1`,
    ],
  };
}

/** The mechanism scoreboard, a line for each rule. */
export function boardLines(board: Scoreboard): string {
  const best = board.rules.map(({ name, component: { module, index }, precision, recall, f1, causal }) => {
    const [p, r, f] = [precision, recall, f1].map(x => x.toFixed(2).padStart(10));
    return `  ${name.padEnd(18)}${p}${r}${f}   ${module}:${index}${causal ? '  causal' : ''}`;
  });
  const { meanF1, nF1AtLeast80, nCausal, rules } = board;
  const total = `${nF1AtLeast80} of ${rules.length} rules with F1 of at least 0.8; ${nCausal} causal`;
  return [
    `\n  ${'rule'.padEnd(18)} precision    recall        F1   best component`,
    ...best,
    `  mean F1 ${meanF1.toFixed(3)}; ${total}`,
  ].join('\n');
}

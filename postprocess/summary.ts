import type { Scoreboard } from './scoreboard.ts';

// What people see of a run on standard output.

/** The final numbers of a run. */
export function summary(
  metrics: Readonly<Record<string, number>>,
  sizes: { components: number; pgdSteps: number },
): string {
  const value = (name: string) => metrics[`eval/${name}`]!;
  const number = (x: number) => (Math.abs(x) >= 1e-3 ? x.toFixed(4) : x.toExponential(2)).padStart(10);
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
  const l0 = Object.keys(metrics).find(name => /^eval\/l0\/[\d.]+_total$/.test(name))!;
  const nats = `        KL   (nats per ${hasCe ? 'token' : 'answer'}, held-out rows)`;
  const units = compared === 'ce_kl/kl' ? nats : '       MSE   (mean squared error, held-out rows)';
  const lines = [
    `\n${''.padEnd(20)}${hasCe ? '        CE' : ''.padEnd(10)}${units}`,
    ...(hasCe ? [`  ${'the target'.padEnd(18)}${number(value('ce_kl/ce_target'))}`] : []),
    ...Object.entries(strategies).map(([name, label]) => line(name, label)),
    `  ${'dead ones deleted'.padEnd(28)}${number(value(`${compared}_alive`))}`,
    `  ${`fresh PGD, ${sizes.pgdSteps} steps`.padEnd(28)}${number(value('loss/PGDReconLoss'))}`,
    `  faithfulness ${value('loss/FaithfulnessLoss').toExponential(2)}`,
    `  L0 ${metrics[l0]!.toFixed(2)} of ${value('n_alive')} alive of ${sizes.components} components`,
  ];
  return lines.join('\n');
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

/**
 * Time and memory of the clustering on made-up firing sets.
 *
 *   npx tsx tools/bench-cluster.ts [--components 10000] [--positions 500000] [--active 50] [--alpha 0.1,1,10]
 *
 * Components answer to causes: a cause is there at a share of the positions that goes like 1/rank, as words do, and each
 * of its five components then fires nine times in ten, and rarely by itself. `active`: components firing at a position.
 */
import { parseArgs } from 'node:util';
import { adjustedRand, countBits, mergeGroups, partitionAfter } from '../postprocess/cluster.ts';
import { seeded } from './make-toy.ts';

const { values } = parseArgs({
  options: {
    components: { type: 'string', default: '10000' },
    positions: { type: 'string', default: '500000' },
    active: { type: 'string', default: '50' },
    alpha: { type: 'string', default: '0.1,1,10' }, // one after another, as `cluster` does
  },
});
const [k, n, active] = [values.components, values.positions, values.active].map(Number) as [number, number, number];
const PER_CAUSE = 5;
const random = seeded(0);
const causes = Math.ceil(k / PER_CAUSE);
const harmonic = Array.from({ length: causes }, (_, i) => 1 / (i + 1)).reduce((a, b) => a + b);
const bits = Array.from({ length: k }, () => new Uint32Array(Math.ceil(n / 32)));
/** Calls `visit` with positions that are each there with probability p. */
function eachAt(p: number, visit: (position: number) => void) {
  for (let at = -1; ; ) {
    at += 1 + Math.floor(Math.log(1 - random()) / Math.log1p(-p));
    if (at >= n) return;
    visit(at);
  }
}
const set = (c: number, p: number) => {
  bits[c]![p >>> 5]! |= 1 << (p & 31);
};
for (let cause = 0; cause < causes; cause++) {
  const own = Array.from({ length: PER_CAUSE }, (_, m) => cause * PER_CAUSE + m).filter(c => c < k);
  const share = Math.min(0.5, active / (0.9 * PER_CAUSE * (cause + 1) * harmonic));
  eachAt(share, p => {
    for (const c of own) if (random() < 0.9) set(c, p);
  });
  for (const c of own) eachAt(share / 20, p => set(c, p));
}
const firings = bits.reduce((sum, b) => sum + countBits(b), 0);
console.log(`${k} components, ${n} positions, ${(firings / n).toFixed(1)} firing at a position`);
let last = performance.now();
const started = last;
for (const alpha of values.alpha.split(',').map(Number)) {
  const [begun, cpu] = [performance.now(), process.cpuUsage()];
  const onMerge = (left: number) => {
    if (performance.now() - last < 10_000) return;
    last = performance.now();
    process.stderr.write(`α ${alpha}: ${left} groups left after ${Math.round((last - begun) / 1000)} s\n`);
  };
  const { merges, L, best } = mergeGroups({ positions: n, bits }, { alpha, onMerge });
  const partition = partitionAfter(k, merges, best);
  const truth = partition.map((_, c) => Math.floor(c / PER_CAUSE));
  const { user, system } = process.cpuUsage(cpu);
  console.log(
    `α ${alpha}: ${k - best} groups; ${(L[0]! / n).toFixed(1)} bits a position, then ${(L[best]! / n).toFixed(1)}; ` +
      `adjusted Rand with the causes ${adjustedRand(partition, truth).toFixed(3)}; ` +
      `${((performance.now() - begun) / 1000).toFixed(0)} s, ${((user + system) / 1e6).toFixed(0)} s of a core`,
  );
}
const seconds = (performance.now() - started) / 1000;
console.log(`${seconds.toFixed(0)} s, peak memory ${(process.resourceUsage().maxRSS / 2 ** 20).toFixed(2)} GiB`);

/**
 * Runs every lesson in its long form on three seeds and prints README's table of them.
 *
 *   npx tsx examples/all.ts [--threads N]      what is done already is read from runs/examples.jsonl
 */
import { spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { fileURLToPath } from 'node:url';

type Marks = Record<string, number | string>;
const LESSONS: { lesson: string; flag: string; which: string[]; shown: string[] }[] = [
  {
    ...{ lesson: 'tms', flag: 'size', which: ['5-2', '5-2-id', '40-10', '40-10-id'] },
    shown: ['mmcs', 'ml2r', 'mmcsAll', 'ml2rAll', 'identityCiError', 'l0', 'reconstruction', 'adversarial'],
  },
  {
    ...{ lesson: 'residual-mlp', flag: 'layers', which: ['1', '2', '3'] },
    shown: ['identityCiError', 'denseError', 'l0', 'reconstruction', 'adversarial'],
  },
  {
    ...{ lesson: 'induction-heads', flag: 'rows', which: ['64'] },
    shown: [
      ...['targetAccuracy', 'accuracyCi', 'accuracyAdversary', 'componentsOfHeads', 'accuracyWithoutPrevious'],
      ...['accuracyWithoutInduction', 'accuracyWithoutOthers'],
    ],
  },
];
const SEEDS = [0, 1, 2];
const FILE = 'runs/examples.jsonl';

fs.mkdirSync('runs', { recursive: true });
const lines = fs.existsSync(FILE) ? fs.readFileSync(FILE, 'utf8').split('\n').filter(Boolean) : [];
const done = new Map(lines.map(line => [JSON.parse(line).command as string, JSON.parse(line).marks as Marks]));

function marksOf(lesson: string, flag: string, which: string, seed: number): Marks | undefined {
  const args = [`--${flag}`, which, '--seed', `${seed}`];
  const command = [lesson, ...args].join(' ');
  if (done.has(command)) return done.get(command);
  const file = fileURLToPath(new URL(`${lesson}.ts`, import.meta.url));
  const options = [...process.execArgv, file, ...args, ...process.argv.slice(2)];
  const { stdout, status } = spawnSync(process.execPath, options, {
    stdio: ['ignore', 'pipe', 'inherit'],
    encoding: 'utf8',
  });
  if (status !== 0) return undefined;
  const marks: Marks = JSON.parse(stdout.trim().split('\n').at(-1)!);
  fs.appendFileSync(FILE, `${JSON.stringify({ command, marks })}\n`);
  return marks;
}

/** The three seeds' values of one mark. */
const shown = (x: number | string | undefined) =>
  typeof x === 'number' && !Number.isInteger(x) ? `${Number(x.toPrecision(3))}` : `${x ?? 'failed'}`;
for (const { lesson, flag, which, shown: names } of LESSONS) {
  const rows = which.map(w => {
    const marks = SEEDS.map(seed => marksOf(lesson, flag, w, seed));
    return `| ${[w, ...names.map(name => marks.map(m => shown(m?.[name])).join(' / '))].join(' | ')} |`;
  });
  console.log(
    `\n| ${[`${lesson}, ${flag}`, ...names].join(' | ')} |\n|${'---|'.repeat(names.length + 1)}\n${rows.join('\n')}`,
  );
}

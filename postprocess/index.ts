import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { readMetrics, readRecord, startProgress } from '../io/index.ts';
import {
  firstRows,
  inputBatch,
  type Job,
  type LanguageModel,
  type Metrics,
  openRun,
  ownLinear,
  type Rows,
  type Run,
  range,
  tidyAsync,
  totalC,
  writeAtomic,
} from '../nano-param-decomp.ts';
import { evaluate } from './eval.ts';
import { harvestFeatures } from './features.ts';
import { type Harvest, harvest, harvestPass, tokenText } from './harvest.ts';
import { renderReport } from './page.ts';
import { readLabels, type Scoreboard, scoreRules } from './scoreboard.ts';
import { boardLines, summary } from './summary.ts';

// What is done with a finished run. Each stage is one module of this folder and one line of JOBS.

export const JOBS: Record<string, Job> = {
  eval: { help: 'evaluates the run: one JSON object on standard output', run: evaluate },
  harvest: {
    help: '(re)builds harvest.json and the page, report.html; --data: on other data',
    async run(dir, changes) {
      const run = await openRun(dir, changes);
      await harvestRun(run, changes.evalData ? undefined : await score(run), run.otherData);
    },
  },
};

/** What follows on the training of a run: summary, scoreboard, harvest and page. */
export async function finish(run: Run, metrics: Metrics): Promise<void> {
  const { config, modules } = run.problem;
  const sizes = { components: totalC(modules), pgdSteps: config.pgdEvalNSteps };
  console.log(summary(metrics, sizes));
  const board = await score(run);
  if (board) console.log(boardLines(board));
  if (config.harvest && config.out) await harvestRun(run, board);
}

/** The scoreboard, where the run has labels. */
async function score(run: Run): Promise<Scoreboard | undefined> {
  const { labels } = run.problem.config;
  return labels ? tidyAsync(() => scoreRules(run, readLabels(labels, run.data.heldOut))) : undefined;
}

/** Harvests a run and writes harvest.json and report.html into its folder. */
export async function harvestRun(
  run: Run,
  scoreboard: Scoreboard | undefined,
  otherData: string[] = [],
): Promise<void> {
  const { data } = run;
  const { config } = run.problem;
  const rows = firstRows(data.train, config.harvestRows || data.train.count);
  const result = rows.row(0) instanceof Int32Array ? await harvestTokens(run, rows) : await harvestFeatures(run, rows);
  // What was harvested is said where it is not the run's own data.
  const noted = otherData.length > 0 ? { ...result, otherData } : result;
  writeAtomic(path.join(config.out, 'harvest.json'), JSON.stringify(noted));
  const history = readMetrics(path.join(config.out, 'metrics.jsonl'));
  const metrics = history.findLast(line => 'eval/n_alive' in line) ?? {};
  const record = readRecord(config.out);
  const shown = { config: record, metrics, history, harvest: result, ...(scoreboard && { scoreboard }) };
  writeAtomic(path.join(config.out, 'report.html'), renderReport(shown));
}

async function harvestTokens({ engine, problem, params, data }: Run, rows: Rows): Promise<Harvest> {
  const { config, modules, target } = problem;
  const passages = Math.min(8, Math.ceil(1024 / rows.seqLen), data.heldOut.count);
  const show = startProgress(rows.count * rows.seqLen, 0, 'token');
  const answerWidth = () => tf.tidy(() => target.forward(inputBatch(rows, [0]), ownLinear(target)).shape.at(-1)!);
  return harvest({
    pass: harvestPass(problem, params),
    engine,
    modules: [...modules],
    vocabSize: (target as Partial<LanguageModel>).arch?.vocab ?? answerWidth(),
    rows,
    tokenText: id => tokenText(data.tokenizer, id),
    passages: range(0, passages).map(i => data.heldOut.row(i) as Int32Array),
    settings: { seed: config.seed },
    progress: positions => show(positions, () => `harvest ${positions} tokens`),
  });
}

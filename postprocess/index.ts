import * as path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { startProgress } from '../io/index.ts';
import {
  type Flags,
  firstRows,
  inputBatch,
  type Job,
  type LanguageModel,
  type Metrics,
  type OpenRun,
  openRun,
  ownLinear,
  type Rows,
  type Run,
  range,
  tidyAsync,
  totalC,
  writeAtomic,
} from '../nano-param-decomp.ts';
import { FLAGS as ASK, ask } from './ask.ts';
import { FLAGS as ATTRIBUTIONS, attributions } from './attributions.ts';
import { FLAGS as CIRCUIT, circuit } from './circuit.ts';
import { FLAGS as CLUSTER, cluster } from './cluster.ts';
import { FLAGS as EDIT, edit } from './edit.ts';
import { evaluate } from './eval.ts';
import { harvestFeatures } from './features.ts';
import { FLAGS as GRAPH, graph } from './graph.ts';
import { type Harvest, harvest, harvestPass, tokenText } from './harvest.ts';
import { FLAGS as INTERPRET, interpret } from './interpret.ts';
import { writePage } from './page-meanings.ts';
import { FLAGS as PIPELINE, postprocess } from './pipeline.ts';
import { readLabels, type Scoreboard, scoreRules } from './scoreboard.ts';
import { FLAGS as SERVE, serve } from './serve.ts';
import { boardLines, summary } from './summary.ts';

// What is done with a finished run. Each stage is one module of this folder and one line of JOBS.

/** A stage that works on the opened run; the folder that it writes to, if it has one, is --out. */
const onRun = <F extends Job['flags']>(
  help: string,
  flags: F,
  stage: (run: OpenRun, flags: Flags) => Promise<number>,
): Job => ({
  help,
  ...(flags && { flags }),
  run: async (dir, { out, ...changes }, given) => stage(await openRun(dir, changes), { ...given, out }),
});
const harvestAgain = async (run: OpenRun) => harvestRun(run, await score(run), run.otherData);

export const JOBS: Record<string, Job> = {
  eval: { help: 'evaluates the run: one JSON object on standard output', run: evaluate },
  harvest: {
    help: '(re)builds harvest.json and the page, report.html; --data: on other data',
    async run(dir, changes) {
      const run = await openRun(dir, changes);
      await harvestRun(run, changes.evalData ? undefined : await score(run), run.otherData);
      return 0;
    },
  },
  graph: onRun('what feeds what: graphs of a --text, or of the passages of the page', GRAPH, graph),
  attributions: onRun('what feeds what over the data, for --minutes', ATTRIBUTIONS, attributions),
  circuit: onRun('which components one prediction of a --text needs', CIRCUIT, circuit),
  ask: onRun('continues a --prompt, with components removed or scaled', ASK, ask),
  edit: onRun('writes an edited Hugging Face folder to --out', EDIT, edit),
  cluster: onRun('groups of components by minimum description length', CLUSTER, cluster),
  interpret: onRun('labels and their scores, through a chat-completions endpoint or files', INTERPRET, interpret),
  postprocess: onRun('harvest, attributions, clusters, labels, page: what is missing of them', PIPELINE, (run, flags) =>
    postprocess(run, flags, {
      harvest: harvestAgain,
      attributions,
      page: async () => writePage(run.problem.config.out, await score(run)),
    }),
  ),
  serve: onRun('the page with a live text box, on 127.0.0.1', SERVE, serve),
};

/** Refuses labels that do not fit the held-out rows before a training starts. */
export function prepare({ problem, data }: Run): void {
  const { labels } = problem.config;
  if (labels) readLabels(labels, data.heldOut);
}

/** Measures beside the original's, at slow evaluations. */
export { compileMeasures as measures } from './measures.ts';

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
  writePage(config.out, scoreboard);
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

import { type Config, compileEvaluation, firstRows, openRun } from '../nano-param-decomp.ts';
import { compileMeasures } from './measures.ts';

/**
 * Evaluates a finished run: one JSON object on standard output, metric names to numbers. Rows that are given are one
 * batch, since the importance loss is no mean over batches; --eval-batch-size splits them. On other data than the run's
 * (`--data`, `--eval-data`) it says so with "eval/other_data": 1.
 */
export async function evaluate(dir: string, changes: Partial<Config>): Promise<number> {
  const run = await openRun(dir, changes);
  const { engine, problem, params, otherData } = run;
  const { config } = problem;
  const { heldOut } = run.data;
  if (changes.evalData && !changes.evalBatchSize) config.evalBatchSize = heldOut.count;
  const rows = changes.evalData ? heldOut : firstRows(heldOut, config.evalBatchSize);
  const { metrics } = await compileEvaluation(engine, problem, params)(rows, config.nSteps, true);
  const more = await compileMeasures(run)(rows);
  const note = otherData.length > 0 ? { 'eval/other_data': 1 } : {};
  console.log(JSON.stringify({ ...metrics, ...more, ...note }));
  return 0;
}

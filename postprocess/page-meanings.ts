/** What the page shows of clusters.json and interpretations.jsonl, where they are there and belong to the run. */
import * as fs from 'node:fs';
import * as path from 'node:path';
import type { Clusters } from './cluster.ts';
import type { PageGroups, PageLabel, PageMeanings } from './formats.ts';
import type { Interpretation, Label } from './interpret.ts';
import { renderReport } from './page.ts';
import { pageData, pageParts } from './parts.ts';
import { componentsHash, type Harvest, readHarvest, type Scoreboard, writeAtomic } from './run-files.ts';

const CURVE = 200;

/** Reads both files; what is missing, broken or of other components is left out. */
export function readMeanings(dir: string, harvest: Pick<Harvest, 'modules'>): PageMeanings {
  const hash = componentsHash(dir);
  const offsets = new Map(harvest.modules.map(({ path: module, offset }) => [module, offset]));
  const columnOf = (module: string, index: number) => (offsets.get(module) ?? Number.NaN) + index;
  const meanings: PageMeanings = {};
  const clusters = read(() => JSON.parse(fs.readFileSync(path.join(dir, 'clusters.json'), 'utf8')) as Clusters);
  if (clusters?.formatVersion === 1 && clusters.components === hash) meanings.groups = pageGroups(clusters, columnOf);
  const lines = read(() => {
    const text = fs.readFileSync(path.join(dir, 'interpretations.jsonl'), 'utf8');
    return text.trimEnd().split('\n').map(line => JSON.parse(line)); // biome-ignore format: a line
  });
  const labels = lines?.[0]?.components === hash ? pageLabels(lines.slice(1), columnOf) : {};
  if (Object.keys(labels).length > 0) meanings.labels = labels;
  return meanings;
}
function read<X>(job: () => X): X | undefined {
  try {
    return job();
  } catch {
    return undefined;
  }
}

type ColumnOf = (module: string, index: number) => number;
function pageGroups(
  { alpha, tau, positions, leaves, best, L, alphas, groups }: Clusters,
  columnOf: ColumnOf,
): PageGroups {
  const k = leaves.length;
  const stride = Math.ceil(k / CURVE);
  const points = L.flatMap((bits, t): [number, number][] =>
    t % stride === 0 || t === best || t === k - 1 ? [[k - t, bits / positions]] : [],
  );
  const list = groups.map(({ members, active }) => ({ columns: members.map(m => columnOf(...m)), active }));
  return { alpha, tau, positions, leaves: k, best, L: points, alphas, list };
}

function pageLabels(lines: readonly Interpretation[], columnOf: ColumnOf): Record<number, PageLabel> {
  const labels: Record<number, PageLabel> = {};
  for (const { module, index, kind, result, model } of lines) {
    const column = columnOf(module, index);
    if (kind === 'label' && (result as Label).label) labels[column] = { ...(result as Label), model, scores: [] };
  }
  for (const { module, index, kind, result } of lines) {
    const label = labels[columnOf(module, index)];
    if (label && kind === 'graph-label' && (result as Label).label) label.graph = (result as Label).label;
    const { score, chance, tokenOverlap } = result as PageLabel['scores'][number];
    if (label && ['detection', 'fuzzing', 'intruder'].includes(kind))
      label.scores.push({ kind, score, chance, ...(tokenOverlap !== undefined && { tokenOverlap }) });
  }
  return labels;
}

/**
 * Renders report.html from what is in the run's folder. The scoreboard of known rules is in none of its files: where
 * none is given, that of the page so far stays.
 */
export function writePage(dir: string, scoreboard?: Scoreboard): void {
  const harvest = readHarvest(dir);
  const lines = read(() => fs.readFileSync(path.join(dir, 'metrics.jsonl'), 'utf8')) ?? '';
  const history = lines.split('\n').flatMap(line => read(() => [JSON.parse(line) as Record<string, number>]) ?? []);
  const metrics = history.findLast(line => 'eval/n_alive' in line) ?? {};
  const config = read(() => JSON.parse(fs.readFileSync(path.join(dir, 'config.json'), 'utf8')));
  const page = path.join(dir, 'report.html');
  const before = read(() => pageData(fs.readFileSync(page, 'utf8'))?.scoreboard as Scoreboard | undefined);
  const board = scoreboard ?? before;
  const parts = {
    ...readMeanings(dir, harvest),
    ...pageParts(dir, harvest.modules),
    ...(board && { scoreboard: board }),
  };
  const shown = { config, metrics, history, harvest, ...parts };
  writeAtomic(page, renderReport(shown));
}

/**
 * interpret --graph: labels that know their neighbours. A pass from the last module to the first says what a component
 * does, from its own output statistics and the labels of the components that it feeds most; a pass from the first to the
 * last says when it fires, from its input statistics and the components that feed it; then one label from both.
 */
import * as files from './run-files.ts';

/** What attributions.json says, as far as it is read here: for each target its strongest sources. */
export type AttributionsFile = {
  components?: string; // SHA-256 of components.safetensors
  targets: { module: string; index: number; sources: AttributionSource[] }[];
};
type AttributionSource = { module?: string; index?: number; token?: number; A: number; Aabs: number };
/** A neighbour in the graph: a component, or a token's embedding; with the sign and size of the attribution. */
export type Neighbour = { name?: string; token?: number; A: number; Aabs: number };
export type Neighbours = {
  upstream(name: string): Neighbour[]; // the strongest first, at most 8
  downstream(name: string): Neighbour[];
  order: string[]; // modules, sources before their targets
};
export const NEIGHBOURS = 8;

const nameOf = (module: string, index: number) => `${module}:${index}`;
const strongest = (list: Neighbour[]) => [...list].sort((a, b) => b.Aabs - a.Aabs).slice(0, NEIGHBOURS);

/** attributions.json of a run. @throws UsageError where it is missing, or belongs to other components */
export function readNeighbours(dir: string, components: string): Neighbours {
  const file = files.readRunFile<AttributionsFile>(dir, 'attributions.json', 'attributions');
  if (file.components !== undefined && file.components !== components)
    files.refuse(`${dir}: attributions.json belongs to other components; attributions --run ${dir} makes it anew`);
  if (!Array.isArray(file.targets)) files.refuse(`${dir}: attributions.json has no list of targets`);
  return neighboursOf(file);
}

export function neighboursOf({ targets }: AttributionsFile): Neighbours {
  const upstream = new Map<string, Neighbour[]>();
  const downstream = new Map<string, Neighbour[]>();
  const feeds = new Map<string, Set<string>>(); // target module -> modules that feed it
  for (const { module, index, sources } of targets) {
    const target = nameOf(module, index);
    if (!feeds.has(module)) feeds.set(module, new Set());
    for (const { module: from, index: i, token, A, Aabs } of sources) {
      const source = from !== undefined && i !== undefined ? nameOf(from, i) : undefined;
      upstream.set(target, [
        ...(upstream.get(target) ?? []),
        source ? { name: source, A, Aabs } : { token: token!, A, Aabs },
      ]);
      if (!source) continue;
      feeds.get(module)!.add(from!);
      if (!feeds.has(from!)) feeds.set(from!, new Set());
      downstream.set(source, [...(downstream.get(source) ?? []), { name: target, A, Aabs }]);
    }
  }
  return {
    upstream: name => strongest(upstream.get(name) ?? []),
    downstream: name => strongest(downstream.get(name) ?? []),
    order: inOrder(feeds),
  };
}

/** Modules so that whatever feeds a module stands before it; by name where nothing decides (or in a circle). */
function inOrder(feeds: ReadonlyMap<string, ReadonlySet<string>>): string[] {
  const left = new Set([...feeds.keys()].sort());
  const order: string[] = [];
  while (left.size > 0) {
    const next = [...left].find(module => ![...feeds.get(module)!].some(from => from !== module && left.has(from)));
    const chosen = next ?? [...left][0]!;
    left.delete(chosen);
    order.push(chosen);
  }
  return order;
}

/** Lines that say which labelled neighbours there are. */
export function neighbourLines(
  neighbours: readonly Neighbour[],
  labelOf: (name: string) => string | undefined,
  text: (token: number) => string,
): string[] {
  const total = neighbours.reduce((sum, { Aabs }) => sum + Aabs, 0);
  return neighbours.map(({ name, token, A, Aabs }) => {
    const what =
      name === undefined ? `the token ${JSON.stringify(text(token!))}` : `${name}, ${labelOf(name) ?? 'no label'}`;
    return `- ${what} (${A < 0 ? 'suppresses' : 'supports'}, ${Math.round((100 * Aabs) / Math.max(total, 1e-30))} % of these)`;
  });
}

import type { Problem } from '../nano-param-decomp.ts';
import type { PromptGraph } from './graph.ts';
export function viewerGraph(_problem: Problem, graph: PromptGraph) { return graph; }

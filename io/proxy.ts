import { BlockList, isIP } from 'node:net';
import { orRefuse, UsageError } from './usage-error.ts';

// Proxies by the variables and rules of the Python library of the Hub. Node's own fetch ignores them (Node 24 has a switch
// for it). undici is that same fetch as a package, with the agent for a proxy that Node leaves out; it is only loaded
// where an address has a proxy.

/** Small letters count before capitals, even when they are set to nothing. */
const variable = (name: string): string => (process.env[name] ?? process.env[name.toUpperCase()] ?? '').trim();

/** Whether one entry of NO_PROXY covers an address: a name with its subdomains, an IP address, a network. */
function covers(entry: string, { protocol, hostname, port }: URL): boolean {
  if (entry === '*') return true;
  const host = hostname.replace(/^\[|\]$/g, '');
  const [, scheme, place = ''] = /^(?:(\w+):\/\/)?(.*)$/.exec(entry) ?? [];
  if (scheme && scheme !== 'all' && `${scheme}:` !== protocol) return false;
  const [, network = '', bits] = /^\[?([\da-f.:]+)\]?(?:\/(\d+))?$/.exec(place) ?? [];
  if (isIP(network)) {
    if (!isIP(host)) return false;
    const [list, family] = [new BlockList(), (ip: string) => (isIP(ip) === 6 ? 'ipv6' : 'ipv4')];
    const widest = isIP(network) === 6 ? 128 : 32;
    if (Number(bits ?? 0) > widest) return false;
    list.addSubnet(network, Number(bits ?? widest), family(network));
    return list.check(host, family(host));
  }
  const [, name = '', ofPort] = /^(.*?)(?::(\d+))?$/.exec(place) ?? [];
  if (!name || (ofPort && ofPort !== port)) return false;
  if (/^\*?\./.test(name)) return host.endsWith(name.replace('*', ''));
  return host === name || (!scheme && name !== 'localhost' && host.endsWith(`.${name}`));
}

/** The proxy for an address; undefined: none. @throws UsageError naming the variable that holds no proxy's address */
export function proxyFor(url: URL): URL | undefined {
  const name = [`${url.protocol.slice(0, -1)}_proxy`, 'all_proxy'].find(variable);
  if (!name) return undefined;
  const entries = variable('no_proxy').toLowerCase().split(',');
  if (entries.some(entry => covers(entry.trim(), url))) return undefined;
  const text = variable(name);
  const proxy = orRefuse(name.toUpperCase(), () => new URL(text.includes('://') ? text : `http://${text}`));
  if (/^(https?|socks5?):$/.test(proxy.protocol)) return proxy;
  throw new UsageError(`${name.toUpperCase()}: ${proxy.protocol}// is not done; takes http://, https:// or socks5://`);
}

/** Connections to proxies that are kept open, by the proxy's address. */
const agents = new Map<string, import('undici').ProxyAgent>();

/** fetch, through the proxy that the variables name for the address. */
export async function fetchThroughProxy(url: URL, init: RequestInit): Promise<Response> {
  const proxy = proxyFor(url);
  if (!proxy) return fetch(url, init);
  const undici = await import('undici').catch(() => {
    throw new UsageError('a proxy is set: that needs the package undici (npm install undici)');
  });
  // a tunnel only for https addresses, as usual
  const agent = agents.get(proxy.href) ?? new undici.ProxyAgent({ uri: proxy.href, proxyTunnel: false });
  agents.set(proxy.href, agent);
  try {
    const options = { ...init, dispatcher: agent } as import('undici').RequestInit;
    return (await undici.fetch(url, options)) as unknown as Response;
  } catch (error) {
    let deepest = error as NodeJS.ErrnoException;
    while (deepest.cause) deepest = deepest.cause as typeof deepest;
    const { code = 'UND', message } = deepest;
    if (message.includes('(407)'))
      throw new UsageError(`the proxy ${proxy.host} asks for a user and a password: http://user:password@host:port`);
    throw new Error(`through the proxy ${proxy.host}: ${/^E[A-Z]+$/.test(code) ? code : message}`);
  }
}

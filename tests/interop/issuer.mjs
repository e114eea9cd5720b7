// An issuer of oauth2-mock-server, directed by lines of JSON: node issuer.mjs <the package's folder> <port>
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [folder, port] = process.argv.slice(2);
const { OAuth2Server } = await import(pathToFileURL(`${folder}/dist/index.mjs`).href);
const server = new OAuth2Server();
const actions = {
  start: async () => {
    await server.start(Number(port), "127.0.0.1");
    return server.issuer.url;
  },
  stop: async () => {
    const { url } = server.issuer;
    await server.stop();
    server.issuer.url = url; // which stop() removes; tokens can be signed while the server is down
  },
  rotate: async ({ algorithm }) => (await server.issuer.keys.generate(algorithm)).kid,
  token: async ({ kid, claims }) =>
    server.issuer.buildToken({ kid, scopesOrTransform: (_, payload) => Object.assign(payload, claims) }),
};
for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  console.log(JSON.stringify((await actions[request.do](request)) ?? null));
}

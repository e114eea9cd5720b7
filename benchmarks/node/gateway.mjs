// A gateway in Node: fastify with its own proxy and rate limit, by client. PORT and UPSTREAM come by environment.
import Fastify from 'fastify'
import proxy from '@fastify/http-proxy'
import rateLimit from '@fastify/rate-limit'

const app = Fastify({ logger: false, bodyLimit: 200_000_000 })
await app.register(rateLimit, {
  max: 1_000_000_000,
  timeWindow: '1 minute',
  keyGenerator: (request) => request.headers['x-client-id'] ?? request.ip,
})
await app.register(proxy, {
  upstream: process.env.UPSTREAM,
  prefix: '/api',
  rewritePrefix: '/api',
  // The proxy would hand on the upstream's own Connection header, and a client that asks to close is not heard then.
  replyOptions: { rewriteHeaders: ({ connection, ...headers }) => headers },
  undici: { connections: 128, pipelining: 1 },
})
await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })

// @anthropic-ai/sdk, Anthropic's JavaScript library.
import { BASE, CHAT, IMAGES, PIXEL, PLACE, QUESTION, TOOLS, aboutParis, ended, refused, run, sees, yes } from './common.mjs'

const { default: Anthropic } = await import(`${process.env.NODE_MODULES}/@anthropic-ai/sdk/index.mjs`)
const client = new Anthropic({ baseURL: BASE, apiKey: 'none', maxRetries: 0 })
const messages = [{ role: 'user', content: QUESTION }]
const few = { max_tokens: 24, temperature: 0 }

await run('@anthropic-ai/sdk', {
  async list() {
    const found = {}
    for await (const model of client.models.list()) found[model.id] = model
    yes(found[CHAT].type === 'model' && found[CHAT].display_name, 'no display name or type')
  },
  async chat() {
    aboutParis((await client.messages.create({ model: CHAT, messages, ...few })).content[0].text)
  },
  async 'count tokens'() {
    yes((await client.messages.countTokens({ model: CHAT, messages })).input_tokens > 5, 'too few tokens')
  },
  async stream() {
    aboutParis(await client.messages.stream({ model: CHAT, messages, ...few }).finalText())
  },
  async tools() {
    const answer = await client.messages.create({
      model: TOOLS, messages: [{ role: 'user', content: 'Weather in Paris?' }], max_tokens: 1500, temperature: 1,
      tools: [{ name: 'weather', strict: true, input_schema: PLACE }], tool_choice: { type: 'tool', name: 'weather' },
    })
    yes(answer.content.some((part) => part.type === 'tool_use' && part.input.place === 'Paris'), 'no call of the tool')
  },
  async images() {
    const source = { type: 'base64', media_type: 'image/png', data: PIXEL }
    const content = [{ type: 'image', source }, { type: 'text', text: 'What is it?' }]
    const answer = await client.messages.create({ model: IMAGES, max_tokens: 8, messages: [{ role: 'user', content }] })
    sees(answer.content[0].text)
  },
  async cancel() {
    const events = client.messages.stream({ model: CHAT, messages, max_tokens: 4000 })
    for await (const event of events) if (event.type === 'content_block_delta') break
    await ended()
  },
  errors: () => refused(() => client.messages.create({ model: 'nobody', messages, max_tokens: 8 }), 404, 'nobody'),
})

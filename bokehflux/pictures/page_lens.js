"use strict";
// A sharp picture through a lens, from its map of blur. Planes of one radius each, the farthest first, are blurred
// in linear light by the aperture's shape and laid over each other; places share two planes, so that nothing jumps.
class Lens {
  static gap = 1; // pixels of radius between planes
  static most = 12; // planes
  static reach = 12; // samples to each side; a larger blur takes means of pixels

  constructor(canvas) {
    this.canvas = canvas;
    const gl = this.gl = canvas.getContext("webgl2", { preserveDrawingBuffer: true, antialias: false });
    gl.getExtension("EXT_color_buffer_float");
    const corner = `#version 300 es
      void main() { gl_Position = vec4(vec2(gl_VertexID % 2, gl_VertexID / 2) * 4. - 1., 0, 1); }`;
    const head = "#version 300 es\nprecision highp float; precision highp sampler2D; out vec4 color;";
    const program = text => {
      const made = gl.createProgram();
      for (const [kind, source] of [[gl.VERTEX_SHADER, corner], [gl.FRAGMENT_SHADER, head + text]]) {
        const shader = gl.createShader(kind);
        gl.shaderSource(shader, source); gl.compileShader(shader); gl.attachShader(made, shader);
      }
      gl.linkProgram(made);
      if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made) || "WebGL");
      return made;
    };
    // Display values, the map and the lights -> light, and the place between far (0) and near (1).
    this.light = program(`uniform sampler2D sharp, map, lights; uniform float brightest;
      void main() {
        ivec2 at = ivec2(gl_FragCoord.xy);
        vec3 light = pow(texelFetch(sharp, at, 0).rgb, vec3(2.2));
        color = vec4(light * pow(brightest, texelFetch(lights, at, 0).r), texelFetch(map, at, 0).r);
      }`);
    this.plane = program(`uniform sampler2D light, shape; uniform float radius, number, last, rim; uniform int reach, stride;
      void main() {
        vec2 size = vec2(textureSize(light, 0));
        float edge = sqrt(radius * radius + .25), level = log2(float(stride)), all = 0., own = 0., over = 0.;
        vec3 sum = vec3(0);
        for (int y = -reach; y <= reach; y++) for (int x = -reach; x <= reach; x++) {
          vec2 by = vec2(x, y) * float(stride);
          vec2 on = (radius > 0. ? by : -by) / max(edge, 1.) / rim;
          float weight = edge <= 1. ? float(x == 0 && y == 0) : texture(shape, on * .5 + .5).r;
          if (weight == 0. || max(abs(on.x), abs(on.y)) > 1.) continue;
          vec4 there = textureLod(light, (gl_FragCoord.xy + by) / size, level);
          float place = there.a * last - number, share = max(1. - abs(place), 0.);
          sum += weight * share * there.rgb; own += weight * share; all += weight;
          over += weight * (number == 0. ? 1. : clamp(place + 1., 0., 1.));
        }
        if (own <= 0.) { color = vec4(0); return; }
        float alpha = min(over / all, 1.) * min(own / all * 16., 1.);
        color = vec4(sum / own * alpha, alpha);
      }`);
    this.shown = program(`uniform sampler2D light;
      void main() {
        ivec2 size = textureSize(light, 0), at = ivec2(gl_FragCoord.xy);
        vec4 seen = texelFetch(light, ivec2(at.x, size.y - 1 - at.y), 0);
        color = vec4(pow(clamp(seen.rgb / max(seen.a, 1e-4), 0., 1.), vec3(1. / 2.2)), 1);
      }`);
  }

  // data: of the page. Resolves once its pictures are decoded.
  async load(data) {
    const { gl } = this, picture = async source => {
      const image = new Image(); image.src = source; await image.decode(); return image; };
    const [sharp, map, lights, ...shapes] = await Promise.all([data.sharp, data.map, data.lights || data.map,
      ...Object.values(data.shapes)].map(picture));
    const { width, height } = sharp;
    Object.assign(this.canvas, { width, height });
    this.data = data;
    this.shapes = Object.fromEntries(Object.keys(data.shapes).map((name, i) => [name, this.texture(shapes[i], true)]));
    const flat = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    flat.drawImage(map, 0, 0);
    this.map = flat.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 === 0);
    const sorted = this.map.slice().sort(), trace = Math.floor(sorted.length / 100);
    this.range = [sorted[sorted.length - 1 - trace], sorted[trace]].map(grey => grey / 255); // near, far
    const none = Object.assign(document.createElement("canvas"), { width, height });
    none.getContext("2d").fillRect(0, 0, width, height);
    const sources = { sharp: this.texture(sharp), map: this.texture(map), lights: this.texture(data.lights ? lights : none) };
    [this.source, this.layers] = [0, 1].map(() => this.target(width, height));
    this.draw(this.light, this.source, { ...sources, brightest: data.brightest });
    gl.bindTexture(gl.TEXTURE_2D, this.source.texture);
    gl.generateMipmap(gl.TEXTURE_2D);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_NEAREST);
  }

  // The grey that is in focus where nothing is asked for.
  get own() {
    const [far, near] = this.data.ends;
    return near > far ? Math.min(Math.max(-far / (near - far), 0), 1) : 0;
  }

  // A share of the way from near to far -> grey, and back.
  grey(share) {
    const [near, far] = this.range;
    return near + share * (far - near);
  }
  share(grey) {
    const [near, far] = this.range;
    return near === far ? 0 : Math.min(Math.max((near - grey) / (near - far), 0), 1);
  }

  // The map's grey, 0 to 1, around a pixel.
  at(x, y) {
    const { width, height } = this.canvas, found = [];
    for (let v = y - 2; v <= y + 2; v++) for (let u = x - 2; u <= x + 2; u++)
      if (u >= 0 && v >= 0 && u < width && v < height) found.push(this.map[v * width + u]);
    return found.sort((a, b) => a - b)[found.length >> 1] / 255;
  }

  // focus: the map's grey that is sharp.
  render(level, focus, shape) {
    const { gl } = this, [far, near] = this.data.ends, span = level * (near - far);
    const last = Math.min(Math.max(Math.ceil(span / Lens.gap), 1), Lens.most - 1);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.layers.frame);
    gl.clearColor(0, 0, 0, 0); gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND); gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    for (let number = 0; number <= last; number++) {
      const radius = (number / last - focus) * span, wide = Math.ceil(Math.abs(radius)) + 1;
      const stride = Math.max(1, Math.ceil(wide / Lens.reach)), reach = Math.ceil(wide / stride);
      this.draw(this.plane, this.layers, { light: this.source.texture, shape: this.shapes[shape], radius, number, last,
        rim: 17 / 16, reach, stride });
    }
    gl.disable(gl.BLEND);
    this.draw(this.shown, null, { light: this.layers.texture });
  }

  texture(source, smooth = false) {
    const { gl } = this, texture = gl.createTexture(), filter = smooth ? gl.LINEAR : gl.NEAREST;
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE, source);
    this.wrap(filter);
    return texture;
  }

  wrap(filter) {
    const { gl } = this;
    for (const way of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, way, gl.MIRRORED_REPEAT);
    for (const size of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, size, filter);
  }

  target(width, height) {
    const { gl } = this, texture = gl.createTexture(), frame = gl.createFramebuffer();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texStorage2D(gl.TEXTURE_2D, Math.floor(Math.log2(Math.max(width, height))) + 1, gl.RGBA16F, width, height);
    this.wrap(gl.NEAREST);
    gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
    return { texture, frame };
  }

  draw(program, target, values) {
    const { gl, canvas } = this, whole = ["reach", "stride"];
    let unit = 0;
    gl.useProgram(program);
    gl.bindFramebuffer(gl.FRAMEBUFFER, target && target.frame);
    gl.viewport(0, 0, canvas.width, canvas.height);
    for (const [name, value] of Object.entries(values)) {
      const place = gl.getUniformLocation(program, name);
      if (value instanceof WebGLTexture) {
        gl.activeTexture(gl.TEXTURE0 + unit); gl.bindTexture(gl.TEXTURE_2D, value); gl.uniform1i(place, unit++);
      } else if (whole.includes(name)) gl.uniform1i(place, value); else gl.uniform1f(place, value);
    }
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.activeTexture(gl.TEXTURE0);
  }
}

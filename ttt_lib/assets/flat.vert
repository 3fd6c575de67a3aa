#version 330 core
// Of novel views (`views/pyrender_backend.py`): places and colours of the vertices as they are.
layout(location = 0) in vec3 position;
layout(location = 1) in vec4 colour;
uniform mat4 V;
uniform mat4 P;
out vec4 shade;
void main() { gl_Position = P * (V * vec4(position, 1.0)); shade = colour; }

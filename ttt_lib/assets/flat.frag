#version 330 core
// Unlit colours; alpha says whether the front of the surface is seen, so that no reversed copy of the mesh is drawn.
in vec4 shade;
out vec4 frag_color;
void main() { frag_color = gl_FrontFacing ? shade : vec4(0.0); }
